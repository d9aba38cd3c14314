"""Run directories: their names, the files in them, and writing a file so that a reader never sees half of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import repan_cli
from repan_cli.errors import InputError

CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
PACKAGES = ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "typer", "rich")


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it, rename it into place, and flush the folder."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RunDirectory:
    """The folder of one run. Creating one that exists is an InputError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise InputError(existing(path)) from None
        except OSError as error:
            raise InputError(f"cannot create the run directory {path}: {error.strerror}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def status(self, state: str, **position: Any) -> None:
        """What the run is doing, for scripts that watch it: running, done, failed or interrupted."""
        self.write_json("status.json", {"state": state, "time": now(), **position})


def existing(path: Path) -> str:
    return f"the run directory {path} exists already; nothing was touched, give another --out"


def check_free(path: str | None) -> None:
    """Complain early about a run directory that exists. Raises InputError."""
    if path and Path(path).exists():
        raise InputError(existing(Path(path)))


def default_path(command: str, *names: str) -> Path:
    """runs/<command>/<date-time>-<names>, with a number behind it where two runs begin in one second."""
    stem = "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), *(name.replace(":", "-") for name in names)])
    return next(path for path in _numbered(Path("runs") / command / stem) if not path.exists())


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def software() -> dict[str, Any]:
    """Versions and command line, for env.json."""
    versions = {"repan": repan_cli.__version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"time": now(), "argv": sys.argv[1:], "versions": versions}
