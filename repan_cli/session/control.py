"""Make the control of a run: the same settings, seed, images, epochs and baseline, but no restarts.

Up to the end of the baseline the run and its control are identical. The control therefore continues from a copy of the
run's state at that point, as if resumed, instead of training the baseline again.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from repan_cli import checkpoint, runs
from repan_cli.config.files import dump
from repan_cli.config.settings import Config, from_flat, replace

PREFIX = "control_"
WAITING = "waiting"
WEIGHTS = ("best.pt", "cycle_00.pt", runs.LAST)
FIGURES = ("env.json", "metrics.jsonl", "metrics.csv")


def without_restarts(config: Config, folder: Path) -> Config:
    """Return the settings of the control that is written to `folder`."""
    return replace(config, _changes(folder))


def _changes(folder: Path) -> dict[str, Any]:
    return {"cycle.restart": "none", "run.out": str(folder)}


def is_awaited(run: Path) -> bool:
    """Return whether a run belongs to a series with controls, and its own control has not begun."""
    series = runs.read_series(run.parent)
    mine = series and series["control"] and not run.name.startswith(PREFIX)
    return bool(mine) and not _of(run).exists()


def _of(run: Path) -> Path:
    return run.with_name(f"{PREFIX}{run.name}")


def begin(run: Path) -> None:
    """Create the run directory of the control from a run that has just finished its baseline."""
    target = _of(run)
    draft = target.with_name(f".{target.name}")
    shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed here
    draft.mkdir()
    for name in FIGURES:
        shutil.copyfile(run / name, draft / name)
    for name in WEIGHTS:
        if (run / name).exists():  # without a validation part there is no best
            saved = checkpoint.load(run / name)
            settings = {**saved.card.settings, **_changes(target)}
            card = dataclasses.replace(saved.card, config=settings)
            checkpoint.save(dataclasses.replace(saved, card=card), draft / name)
    with runs.RunDirectory(draft, reopen=True) as folder:
        folder.write_text("config.yaml", dump(from_flat(settings)))
        folder.status(WAITING, cycle=0)
    draft.replace(target)
