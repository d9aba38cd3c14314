"""Find the study that a run belongs to, and the command that continues it.

A study's folder holds a folder for each arm, with a file of its settings next to its runs, and `study.json`: the
command that was given, and the state of the study.
"""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

from repan_cli.config.conventions import ARM_FILE
from repan_cli.errors import InputError
from repan_cli.system.files import read_json, to_json, write_bytes
from repan_cli.system.text import quoted

STUDY = "study.json"


def is_study(path: Path) -> bool:
    """Return whether a folder holds the arms of a study: a file of settings next to the runs of each."""
    return any(path.glob(f"*/{ARM_FILE}"))


def study_of(run: Path) -> Path | None:
    """Return the folder of the study that a run belongs to; None if it belongs to none."""
    return run.parent.parent if (run.parent / ARM_FILE).is_file() else None


def note(study: Path, state: str, command: str) -> None:
    """Record that a study is running, done, stopped or failed, and the command that continues it."""
    process = {"pid": os.getpid(), "host": platform.node()}
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    text = to_json({"state": state, "time": time, **process, "command": command}, indent=2)
    write_bytes(study / STUDY, f"{text}\n".encode())


def status_of(study: Path) -> dict[str, Any]:
    """Return what a study has recorded; nothing if that is missing, as in older studies, or damaged."""
    with contextlib.suppress(InputError):
        return read_json(study / STUDY)
    return {}


def how_to_continue(study: Path) -> str:
    """Return the command that continues a study. Older ones did not record it."""
    command = status_of(study).get("command")
    return command if isinstance(command, str) else f"repan study GRID --out {quoted(study)}"


def is_unfinished(study: Path) -> bool:
    """Return whether a study has recorded that runs are left."""
    return status_of(study).get("state", "done") != "done"
