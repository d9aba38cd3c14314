"""Write files so that a reader never sees an incomplete one; read and write JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from repan_cli.errors import FULL, InputError, OutOfSpaceError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read")
    return content


def to_json(content: Any, *, indent: int | None = None, sort_keys: bool = False, compact: bool = False) -> str:
    """Return the JSON of plain types. Numbers that are not finite become null, since JSON has none."""
    separators = (",", ":") if compact else None
    encoder = json.JSONEncoder(indent=indent, sort_keys=sort_keys, separators=separators, allow_nan=False)
    try:
        return encoder.encode(content)
    except ValueError:
        return encoder.encode(_finite(content))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file next to `path` with `write`, flush it, rename it into place, and flush the folder."""
    with temporary_file(path) as (file, name):
        write(file)
        flush(file)
        file.close()  # Windows cannot rename an open file
        name.replace(path)


def make_folder(path: Path) -> None:
    """Make the folder for a file that will be written. Raises InputError if it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path.parent}: {error.strerror}; give another --out") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `write_atomically` does, with this content."""
    write_atomically(path, lambda file: file.write(content))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by name, into a folder that appears with all of them; in an existing folder each is replaced."""
    if path.is_dir():
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path / name, content)
        return
    try:
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}."))
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        aside.chmod(0o777 & ~_umask())
        write_folder(aside, files)
        aside.replace(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush_folder(path.parent)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a file next to `path` for writing, with its name; remove it if something fails.

    Raises InputError if no file can be made. Raises OutOfSpaceError, with the free space, if the disk is full.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")  # a name may fill its 255 bytes
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            Path(name).chmod(0o666 & ~_umask())
            yield file, Path(name)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        raise OutOfSpaceError(f"no space left to write {path}: {free}; free some space, and resume") from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def flush(file: IO[Any]) -> None:
    """Write buffered data to the disk."""
    file.flush()
    os.fsync(file.fileno())


STATUS = Path("/proc/self/status")
_ASKING = threading.Lock()


def _umask() -> int:
    """Return the process's mask of file modes.

    Linux tells it. Elsewhere it can only be read by setting it: of two threads that do so at once, one would read and
    leave behind the other's 0, with which every later file could be written by everybody.
    """
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    with _ASKING:
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
