"""Record a run: metrics, checkpoints, the state to resume from, the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repan_cli import checkpoint, runs
from repan_cli.checkpoint.card import RunState
from repan_cli.checkpoint.format import Checkpoint, weights_of
from repan_cli.config.conventions import TEST_SET
from repan_cli.config.settings import flatten
from repan_cli.data.types import LazyImages
from repan_cli.errors import OutOfSpaceError
from repan_cli.runs import felt
from repan_cli.runs.trackers import Csv, JsonLines, TrackedRun, Tracker, open_requested, read_metrics, rewind
from repan_cli.session import control
from repan_cli.session.build import LEFT_OUT, MOST_LEFT_OUT, Session
from repan_cli.training.events import CycleEnd, CycleStart, Epoch, Event, StepEnd
from repan_cli.training.snapshot import snapshot

SAVING_SHARE = 0.02
"""The share of a run's time that saving after epochs may take. If epochs are short, some are not saved."""

WATCHED = ("top1_before", "top1_after_restart", "loss_before", "loss_after_restart", "logit_error")


class Record:
    """Records the events of a run. `begun` holds the notes of a resumed run, from its `last.pt`."""

    def __init__(self, session: Session, folder: runs.RunDirectory, begun: Mapping[str, Any] | None = None) -> None:
        self.session, self.folder = session, folder
        self.began = time.perf_counter()
        begun = begun or {"summary": _new_summary(session), "start": {}, "epoch": {}, "seconds": 0.0}
        self.summary, self.start, self.epoch = begun["summary"], begun["start"], begun["epoch"]
        self.seconds_before = begun["seconds"]
        self.best: Checkpoint | None = None  # written with the next state
        self.saved_at, self.saving = time.perf_counter(), 0.0
        rewind(folder.path, *self.position())
        self.requested = open_requested(session.config.run.trackers, _tracked(session, folder))
        self.tables = JsonLines(folder / "metrics.jsonl"), Csv(folder / "metrics.csv")
        self.trackers: list[Tracker] = [*self.tables, *self.requested]

    @property
    def seconds(self) -> float:
        """Return the seconds since the run began, without the time during which it was stopped."""
        return self.seconds_before + time.perf_counter() - self.began

    def position(self) -> tuple[int, int]:
        """Return the cycle, and the number of its finished epochs."""
        plan, progress = self.session.training.plan, self.session.training.progress
        return plan[min(progress.phase, len(plan) - 1)].cycle, progress.epoch if progress.phase < len(plan) else 10**9

    def open(self) -> None:
        """Save the initial weights of a run of cycles, and a first state, before the first step."""
        session = self.session
        self.folder.status("running")
        if session.start:
            if session.start["top1"] is not None:  # the initial weights also compete for the best
                session.training.progress.best_top1 = session.start["top1"]
                self._save("best.pt", 0, None, session.start)
            if session.command == "cycle":
                self._save("cycle_00.pt", 0, None, session.start)
        self.save_last()

    def take(self, event: Event) -> None:
        if isinstance(event, CycleStart):
            self.start = dataclasses.asdict(event)
            if event.cycle:
                self._log("restart", self.start)
        elif isinstance(event, StepEnd):
            if saves_at(self.session, event):
                self.save_last()
        elif isinstance(event, Epoch):
            self._take_epoch(event)
        elif isinstance(event, CycleEnd):
            self._take_end(event)

    def _take_epoch(self, event: Epoch) -> None:
        self.epoch = _metrics(event)
        if event.best:
            self.best = self._capture(event.cycle, event.epoch, self.epoch)
        self._log("epoch", dataclasses.asdict(event))
        if (time.perf_counter() - self.saved_at) * SAVING_SHARE >= self.saving:
            self.save_last()
            self.folder.status("running", cycle=event.cycle, epoch=event.epoch)

    def _take_end(self, event: CycleEnd) -> None:
        row = {"top1": event.top1, "test_top1": event.test_top1, "seconds": event.seconds}
        if event.cycle == 0:
            self.summary["baseline"] = row
        else:
            before = {name: self.start[name] for name in WATCHED}
            felt_by = self._felt(event.cycle)
            self.summary["cycles"].append({"cycle": event.cycle, **before, "felt": felt_by, **row})
        if self.session.command == "cycle":
            self._save(f"cycle_{event.cycle:02d}.pt", event.cycle, None, _metrics(event))
        self._log("cycle_end", dataclasses.asdict(event))
        self.save_last()
        if event.cycle == 0 and control.is_awaited(self.folder.path):
            control.begin(self.folder.path)

    def _felt(self, cycle: int) -> dict[str, float | None]:
        """Return the training losses around the start of a cycle."""
        training = self.session.training
        pace = felt.Pace(training.train.count, training.batch_size, training.accumulate)
        return felt.around(read_metrics(self.folder / "metrics.jsonl"), cycle, pace)

    def finish(self) -> None:
        """Log the final figures."""
        flat = {f"test_{name}": value for name, value in self.summary["test"].items() if name in ("top1", "top5")}
        self._log(
            "final", {**flat, **{f"fused_{name}": value for name, value in self.summary.get("fused", {}).items()}}
        )

    def _log(self, kind: str, figures: Mapping[str, Any]) -> None:
        """Log figures, always before the state is saved.

        After a kill, figures that are newer than the state are removed. Figures that had not been written would be
        lost.
        """
        progress, plan = self.session.training.progress, self.session.training.plan
        epochs = sum(phase.epochs for phase in plan[: progress.phase]) + progress.epoch
        for tracker in self.trackers:
            tracker.log(kind, epochs, figures)

    def save_last(self) -> None:
        """Save the weights and everything else that the run needs to resume from here.

        Raises DivergedError instead if an update since the last save was not finite.
        """
        training, began = self.session.training, time.perf_counter()
        if training.progress.totals is not None:
            training.progress.totals.check()
        self._save_best()
        tensors, plain = snapshot(training)
        cycle, epoch = self.position()
        begun = {"summary": self.summary, "start": self.start, "epoch": self.epoch, "seconds": self.seconds}
        begun |= _left_out(self.session)
        card = self.session.card(cycle=cycle, epoch=min(epoch, training.plan[-1].epochs), metrics=self.epoch)
        card = dataclasses.replace(card, run=RunState(plain, begun, finished=self.session.start is not None))
        content = checkpoint.as_bytes(Checkpoint(weights_of(training.scored), card, tensors), ".pt")
        for table in self.tables:
            table.keep()
        self.folder.replace_last(lambda file: file.write(content))
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - began

    def _save_best(self) -> None:
        if self.best is not None:
            checkpoint.save(self.best, self.folder / "best.pt")
            self.best = None

    def _save(self, name: str, cycle: int, epoch: int | None, metrics: Mapping[str, Any]) -> None:
        checkpoint.save(self._capture(cycle, epoch, metrics), self.folder / name)

    def _capture(self, cycle: int, epoch: int | None, metrics: Mapping[str, Any]) -> Checkpoint:
        card = self.session.card(cycle=cycle, epoch=epoch, metrics=dict(metrics))
        return checkpoint.capture(self.session.training.scored, card)

    def close(self) -> None:
        with contextlib.suppress(OSError, OutOfSpaceError):  # the run has failed: no other error may hide the first
            self._save_best()
        for tracker in self.trackers:
            tracker.close()


def _left_out(session: Session) -> dict[str, Any]:
    """Return the note of the images that a run of `data.on_error=skip` began without."""
    part = session.dataset.train
    if session.config.data.on_error != "skip" or not isinstance(part, LazyImages) or len(part.left_out) > MOST_LEFT_OUT:
        return {}
    return {LEFT_OUT: list(part.left_out)}


def _metrics(event: Epoch | CycleEnd) -> dict[str, Any]:
    found = {name: value for name, value in dataclasses.asdict(event).items() if name not in ("cycle", "epoch", "best")}
    if found.get("test_top5", 0) is None:  # meaningless with five classes or fewer
        del found["test_top5"]
    return found


def _tracked(session: Session, folder: runs.RunDirectory) -> TrackedRun:
    return TrackedRun(folder.path, session.command, flatten(session.config, cycles=session.command == "cycle"))


def _new_summary(session: Session) -> dict[str, Any]:
    config, data = session.config, session.dataset
    return {
        "command": session.command,
        "model": config.model.name,
        "block": config.block.name,
        "dataset": config.data.name,
        "classes": len(data.classes),
        "images": {name: len(part.labels) for name, part in data.parts.items()},
        TEST_SET: data.digest_of("test"),
        "seed": config.run.seed,
        "baseline": session.start,
        "cycles": [],
    }


def saves_at(session: Session, event: StepEnd) -> bool:
    """Return whether the run saves after this update, within an epoch. If so, rank 0 holds the sums of all ranks."""
    every = session.config.run.save_every
    if every is None or event.step // every == (event.step - session.training.accumulate) // every:
        return False
    pool(session)
    return True


def pool(session: Session) -> None:
    """Collect the sums of all ranks over the current epoch on rank 0."""
    totals = session.training.progress.totals
    assert totals is not None, "an update of this epoch has been made"
    totals.pool(session.training.runtime.rank)


def chosen_file(folder: Path) -> Path:
    """Return the checkpoint that validation chose, or the last one if nothing was held out."""
    return next(path for path in (folder / "best.pt", folder / runs.LAST) if path.exists())
