"""List the runs below a folder: the command of each, its progress, and how to continue it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from repan_cli.config.files import read_file
from repan_cli.errors import InputError
from repan_cli.runs import studies
from repan_cli.runs.directory import HEARTBEAT, SERIES, command_of, goes_on
from repan_cli.runs.trackers import read_metrics
from repan_cli.system.files import read_json
from repan_cli.system.text import quoted
from repan_cli.system.user_code import own_code_options

KILLED, UNKNOWN = "killed", "not known"


@dataclass(frozen=True)
class Run:
    """A run in a list.

    Attributes:
        best: the best validation top-1.
        test: the test top-1 of a finished run.
        age: seconds since the last sign of life.
        go_on: the command that continues the run, or all of which it is a part; empty if nothing does.
        part_of: the folder of the study, or of the series of seeds and controls, that the run belongs to.
    """

    path: Path
    command: str
    state: str
    best: float | None
    test: float | None
    age: float
    go_on: str
    part_of: Path | None = None


def runs_below(root: Path) -> list[Run]:
    """Return the runs below a folder, the most recently active first; hidden folders are drafts that a kill left."""
    folders = [file.parent for file in root.rglob("config.yaml") if not file.parent.name.startswith(".")]
    found = [_run(folder) for folder in folders if not (folder / SERIES).exists()]
    return sorted(found, key=lambda run: run.age)


def _run(path: Path) -> Run:
    status: dict[str, Any] = {}
    with contextlib.suppress(InputError):
        status = read_json(path / "status.json")
    command, state, whole = command_of(path), _state(status), whole_of(path)
    scores = [record.get("val_top1") for record in read_metrics(path / "metrics.jsonl")]
    known = [float(score) for score in scores if isinstance(score, (int, float))]
    return Run(
        path=path,
        command=command,
        state=state,
        best=max(known, default=None),
        test=_test(path),
        age=time.time() - _last_sign(path, status),
        go_on=_how(path, command, whole, is_over=state in ("done", "running")),
        part_of=whole,
    )


def whole_of(path: Path) -> Path | None:
    """Return the folder of the study, or of the series of seeds and controls, that a run belongs to; else None."""
    return path.parent if (path.parent / SERIES).exists() else studies.study_of(path)


def _state(status: dict[str, Any]) -> str:
    """Return the state of a run; one that is recorded as 'running' without a process was killed.

    After a reboot, or in another container, its number may be that of another process, so its heartbeat counts too.
    """
    state = str(status.get("state", UNKNOWN))
    if state != "running":
        return state
    if status.get("host") == platform.node() and not _lives(status.get("pid")):
        return KILLED
    beat = _seconds(status.get("heartbeat"))
    return state if beat is None or time.time() - beat < 10 * HEARTBEAT else KILLED


def _lives(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _last_sign(path: Path, status: dict[str, Any]) -> float:
    signs = (_seconds(status.get(name)) for name in ("heartbeat", "time"))
    return next((sign for sign in signs if sign is not None), (path / "config.yaml").stat().st_mtime)


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _test(path: Path) -> float | None:
    with contextlib.suppress(InputError, LookupError, TypeError, ValueError):
        return float(read_json(path / "summary.json")["test"]["top1"])
    return None


def _how(path: Path, command: str, whole: Path | None, *, is_over: bool) -> str:
    """Return the command that continues a run, including the user's network and blocks, or what it belongs to.

    A study or series may have runs left that did not begin, so its own state counts too.
    """
    told = {} if whole is None else _status_of_whole(whole)
    if whole is not None and told:
        is_over = _state(told) in ("done", "running")
    if is_over:
        return ""
    if whole is not None and not (whole / SERIES).exists():
        return studies.how_to_continue(whole)
    if not goes_on(path):
        return ""
    settings: dict[str, Any] = {}
    with contextlib.suppress(InputError):
        settings = read_file(path / "config.yaml")
    return f"repan {command} --resume {quoted(whole or path)}{own_code_options(settings)}"


def _status_of_whole(whole: Path) -> dict[str, Any]:
    """Return the status of a study or a series; nothing if it recorded none."""
    if not (whole / SERIES).exists():
        return studies.status_of(whole)
    with contextlib.suppress(InputError):
        return read_json(whole / "status.json")
    return {}
