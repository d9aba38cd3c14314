"""Manage run directories: their names, their files, and writes that never show a reader an incomplete file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import repan_cli
from repan_cli.config.conventions import PLACES
from repan_cli.errors import InputError, OutOfSpaceError
from repan_cli.runs import studies
from repan_cli.system.files import flush, read_json, temporary_file, to_json, write_atomically
from repan_cli.system.text import count, quoted

PACKAGES = ("torch", "torchvision", "timm", "safetensors", "numpy", "scipy", "pillow", "typer", "rich")

MACHINE = ("versions", "python", "device", "gpu", "cuda", "precision", "threads")
"""The facts of env.json that a result may depend on. None names a user's machine or folders."""

LOCKED = 2**30
"""The byte that is locked on Windows: far after the text, since other processes cannot read a locked range."""


def _lock(path: Path) -> IO[str]:
    """Take a lock that only one process can hold, and that is released when the process ends, however it ends."""
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write into the run directory {path.parent}: {error.strerror}") from None
    try:
        _lock_file(file)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"the run directory {path.parent} is being written by {holder}: wait until it ends") from None
    _HELD.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


_HELD: weakref.WeakSet[IO[str]] = weakref.WeakSet()
"""The files whose locks this process holds."""


def _let_go() -> None:
    """Close a child's copies of locks, which would otherwise hold them after the process itself has ended."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file in _HELD:
        if not file.closed:
            os.dup2(nothing, file.fileno(), inheritable=False)
    os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock_file(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file.fileno(), LOCKED, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


LEFTOVER = re.compile(
    r"\.((last|best|cycle_\d+)\.pt|(status|summary|env|trackers)\.json|metrics\.(jsonl|csv)|config\.yaml)\.\w{8}"
)
"""Temporary files of data that only the run itself writes."""


def _remove_leftovers(path: Path) -> None:
    """Remove incomplete temporary files that kills have left behind."""
    for file in path.iterdir():
        if LEFTOVER.fullmatch(file.name):
            with contextlib.suppress(OSError):
                file.unlink()


HEARTBEAT = 30
"""Seconds between two heartbeats in status.json."""

LAST, PREVIOUS = "last.pt", "last_previous.pt"
"""The files that a run resumes from: the newest state, and the previous one in case that is damaged."""

SERIES = "series.json"
"""The file that marks a folder of several runs made by one command."""


class RunDirectory:
    """The folder of one run. Only one process at a time may write to it, until it leaves the `with` block or ends.

    Creating a folder that exists raises InputError, and so does reopening one that is being written to.
    """

    def __init__(self, path: Path, *, reopen: bool = False) -> None:
        self.path = path
        if not reopen:
            self._create()
        self._lock = _lock(path / ".lock")
        if reopen:
            _remove_leftovers(path)
        self._status: dict[str, Any] = {}
        self._speaking = threading.Lock()

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise InputError(existing(self.path)) from None
        except OSError as error:
            raise InputError(
                f"cannot create the run directory {self.path}: {error.strerror}; give another --out"
            ) from None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *failure: object) -> None:
        self._lock.close()

    def replace_last(self, write: Callable[[IO[bytes]], object]) -> None:
        """Write a new last.pt and keep the old one as last_previous.pt, so that one of them is always whole."""
        with temporary_file(self.path / LAST) as (file, name):
            write(file)
            flush(file)
            file.close()  # Windows cannot rename an open file
            with contextlib.suppress(FileNotFoundError):  # there is none yet
                (self.path / LAST).replace(self.path / PREVIOUS)
            name.replace(self.path / LAST)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, to_json(content, indent=2) + "\n")

    def note_machine(self, here: Mapping[str, Any]) -> None:
        """Add the machine of a resume to env.json, under `resumed`, unless it and its software are those before."""
        with contextlib.suppress(InputError, TypeError, AttributeError):  # without a readable env.json, runs resume too
            facts = read_json(self.path / "env.json")
            machines = [facts, *facts.get("resumed", [])]
            if any(here.get(key) != machines[-1].get(key) for key in MACHINE):
                self.write_json("env.json", {**facts, "resumed": [*machines[1:], dict(here)]})

    def status(self, state: str, **position: Any) -> None:
        """Record the run's state for scripts: running, done, failed, diverged, interrupted, preempted.

        A killed run stays 'running'. Its process no longer exists on its host, and its heartbeat grows old.
        """
        with self._speaking:
            process = {"pid": os.getpid(), "host": platform.node()}
            self._status = {"state": state, "time": now(), **process, "heartbeat_seconds": HEARTBEAT, **position}
            self._write_status()

    def beat(self) -> None:
        """Update the heartbeat of the run."""
        with self._speaking, contextlib.suppress(OSError, OutOfSpaceError):  # the run itself will report it
            if self._status.get("state") == "running":
                self._write_status()

    def _write_status(self) -> None:
        self.write_json("status.json", {**self._status, "heartbeat": now()})


class Heartbeat:
    """Calls `beat` at a fixed interval in seconds, from its own thread, between `start` and `stop`."""

    def __init__(self, beat: Callable[[], None], *, seconds: float) -> None:
        self.beat, self.seconds = beat, seconds
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.stopped.wait(self.seconds):
            self.beat()

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()


def read_series(path: Path) -> dict[str, Any] | None:
    """Read the description of a folder of several runs; None for other folders.

    Raises InputError if it cannot be read.
    """
    if not (path / SERIES).exists():
        return None
    try:
        about = json.loads((path / SERIES).read_text(encoding="utf-8"))
        return {name: about[name] for name in ("command", "seeds", "control", "settings")} | {
            name: about[name] for name in (PLACES,) if name in about
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path / SERIES} is damaged: resume the runs in {path} one by one") from None


def goes_on(path: Path) -> bool:
    """Return whether a folder holds a state to resume from. A run that was killed before its first save has none."""
    return any((path / name).exists() for name in (LAST, PREVIOUS, SERIES))


def existing(path: Path) -> str:
    mend = "give another --out"
    if (path / LAST).exists() and state_of(path) == "done" and not (path / SERIES).exists():
        mend += f", where --init {quoted(path / LAST)} goes on from its weights"
    elif goes_on(path):
        mend = f"continue with --resume {quoted(path)}, or {mend}"
    elif studies.is_study(path):
        mend += f"; it is the folder of a study, which you continue with: {studies.how_to_continue(path)}"
    return f"the run directory {path} already exists; nothing was changed: {mend}"


def find(command: str, name: str) -> Path:
    """Return the run directory that `--resume NAME` means: a folder, a file in it, or the latest of the command."""
    if name == "latest":
        return _latest(command)
    path = Path(name).parent if Path(name).is_file() else Path(name)
    if not path.is_dir():
        raise InputError(f"no run directory {path} to resume")
    if not (path / "config.yaml").exists():
        if studies.is_study(path):
            raise InputError(f"{path} is the folder of a study: continue it with: {studies.how_to_continue(path)}")
        raise InputError(f"{path} is not a run directory: it has no config.yaml")
    return path


def _latest(command: str) -> Path:
    """Return the newest unfinished run of a command anywhere below `runs`; if all are finished, the newest one.

    Raises InputError, with the command that continues it, if that run belongs to a study with runs left.
    """
    begun = [path.parent for path in Path("runs").rglob("config.yaml") if not path.parent.name.startswith(".")]
    of_series = {path.parent for path in Path("runs").rglob(SERIES)}
    found = [path for path in begun if goes_on(path) and path.parent not in of_series and command_of(path) == command]
    if not found:
        raise InputError(f"no run of 'repan {command}' under runs: give its directory instead of 'latest'")
    newest = max(found, key=lambda path: (_has_work_left(path), (path / "config.yaml").stat().st_mtime))
    study = studies.study_of(newest)
    if study is None or not _has_work_left(newest):
        return newest
    raise InputError(
        f"the newest run, {newest}, belongs to a study: give its directory to continue it alone, or continue the study "
        f"with: {studies.how_to_continue(study)}"
    )


def _has_work_left(path: Path) -> bool:
    """Return whether a run is not finished, or belongs to a study that is not."""
    study = studies.study_of(path)
    return state_of(path) != "done" or (study is not None and studies.is_unfinished(study))


def command_of(path: Path) -> str:
    """Return the command of a run, from its files or else from the name of the folder that contains it."""
    with contextlib.suppress(InputError, LookupError, TypeError):
        if (path / SERIES).exists():
            return str(read_json(path / SERIES)["command"])
        facts = read_json(path / "env.json")
        return str(facts.get("command") or facts["argv"][0])
    return path.parent.name


def state_of(path: Path) -> str | None:
    """Return the state of a run, such as 'done', from its status.json; None if that is missing or unreadable."""
    with contextlib.suppress(InputError):
        state = read_json(path / "status.json").get("state")
        return state if isinstance(state, str) else None
    return None


def is_finished(path: Path, cycles: int | None) -> InputError:
    """Return the error for resuming a finished run. A run of `cycles` may get more of them, others may not."""
    begin = f"; begin another run from its weights with --init {quoted(path / LAST)}"
    more = begin if cycles is None else f"; to train more than its {count(cycles, 'cycle')}, give --cycles N"
    return InputError(f"{path} is finished{more}")


def discard_unsaved(path: Path) -> None:
    """Remove the folder of a run that was killed before it saved a state, so that the run can start again.

    Raises InputError if the run is still alive, or if the folder holds results: a run saves a state before its first
    step, so that one with records of epochs has lost it.
    """
    if not path.exists() or goes_on(path):
        return
    if (path / "summary.json").exists():
        raise InputError(f"{path} holds a summary but no state to continue from: move it away, or keep it as done")
    records = path / "metrics.jsonl"
    if records.exists() and records.stat().st_size:
        raise InputError(
            f"{path} holds records of epochs but no {LAST} to continue from: bring that back, or move the folder away"
        )
    with RunDirectory(path, reopen=True):
        shutil.rmtree(path)


def check_free(path: str | None) -> None:
    """Raise InputError early if a run directory exists."""
    if path and Path(path).exists():
        raise InputError(existing(Path(path)))


def claim_default(command: str, *names: str) -> Path:
    """Make runs/<command>/<date-time>-<names>; a number is appended if two runs begin in the same second."""
    stem = "-".join([datetime.now().strftime("%Y%m%d-%H%M%S"), *map(_in_a_name, names)])
    for path in _numbered(Path("runs") / command / stem[:MOST_NAME]):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.parent.is_dir():
                continue
            raise InputError(f"cannot create the run directory {path}: runs is a file; give --out") from None
        except OSError as error:
            raise InputError(f"cannot create the run directory {path}: {error.strerror}; give --out") from None
        return path
    raise AssertionError("numbers do not end")


def _in_a_name(name: str) -> str:
    """Return a name as part of a folder's name; a user's file is named without its folders."""
    file, colon, function = name.rpartition(".py:")
    short = f"{Path(file).name}-{function}" if colon else name
    return short.replace(":", "-").replace("/", "-")


MOST_NAME = 200
"""The characters allowed in the name of a run directory."""


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def software() -> dict[str, Any]:
    """Return versions, command line and working directory for env.json."""
    versions = {"repan": repan_cli.__version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"time": now(), "argv": sys.argv[1:], "cwd": str(Path.cwd()), "git": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """Return the git commit of the working directory; None outside of a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):  # no git, or one that hangs
        return None
    return found.stdout.strip() if found.returncode == 0 else None
