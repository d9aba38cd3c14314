"""Run `repan train`, `distill` and `cycle`: one session from configuration to summary.

They differ only in their plan.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repan_cli import runs
from repan_cli.config.advice import how_to_restart_smoothly, why_loss_jumped
from repan_cli.config.files import dump
from repan_cli.config.resolve import Resolved
from repan_cli.data.batches import Batch
from repan_cli.display.console import Display
from repan_cli.errors import (
    DivergedError,
    InterruptedRunError,
    LostRankError,
    OutOfSpaceError,
    PreemptedRunError,
    StoppedError,
)
from repan_cli.session import mosaic
from repan_cli.session.build import Session, prepare
from repan_cli.session.pace import PaceWatch, TimeLimit
from repan_cli.session.recorder import Record, pool, saves_at
from repan_cli.session.summary import conclude, draw, finish, header, warned
from repan_cli.system.device import describe_machine
from repan_cli.system.files import to_json
from repan_cli.system.ranks import leave_ranks, summed
from repan_cli.system.signals import StopSignals
from repan_cli.system.text import count, quoted
from repan_cli.training.events import Event, StepEnd
from repan_cli.training.listeners import announce
from repan_cli.training.loop import fit
from repan_cli.training.run import Training

STEPS_BETWEEN_STOPS = 10
"""The number of steps between two queries of the other ranks. On GPUs each query is a host-device sync."""


ALONE_AFTER = 5
"""Seconds after which a rank that waits for images stops without the others."""


def run(command: str, resolved: Resolved, *, as_json: bool) -> Path | None:
    """Prepare, train, merge, and report. Of several ranks only the first writes and reports.

    Returns the run directory on the first rank, None on the others.
    """
    session = prepare(command, resolved)
    if session.training.runtime.rank:
        follow(session)
        return None
    try:
        return begin(session, resolved, as_json=as_json)
    except KeyboardInterrupt:  # between creation of the folder and the first step
        raise InterruptedRunError("stopped before training began; there is no save to resume from") from None


def begin(session: Session, resolved: Resolved, *, as_json: bool) -> Path:
    """Create the run directory of a prepared run, carry the run out, and return the directory."""
    command, config = session.command, session.config
    path = Path(config.run.out) if config.run.out else runs.claim_default(command, *session.names)
    with runs.RunDirectory(path, reopen=not config.run.out) as folder:
        session.training.task_of.folder = folder.path
        folder.write_text("config.yaml", dump(config, cycles=command == "cycle"))
        folder.write_json(
            "env.json", {**runs.software(), "command": command, **describe_machine(session.training.runtime)}
        )
        carry_out(session, folder, resolved, as_json=as_json)
    return path


def carry_out(
    session: Session,
    folder: runs.RunDirectory,
    resolved: Resolved,
    *,
    begun: Mapping[str, Any] | None = None,
    as_json: bool,
) -> None:
    """Train and report, from the start or, with the notes that a run had `begun`, from where it stopped.

    Raises InterruptedRunError on Ctrl-C, and PreemptedRunError if another signal asks to stop. Everything is saved
    first.
    """
    training, limit = session.training, TimeLimit(session.config.run.max_hours)
    epochs = {phase.cycle: phase.epochs for phase in training.plan}
    steps = training.train.steps(session.config.data.batch_size)
    display = Display(
        epochs=epochs,
        steps=steps,
        log=folder / "log.txt",
        compiles=session.config.run.compile == "on",
        ramps=any(phase.attach_rate(0.0) not in (None, 1.0) for phase in training.plan),
        jumped=why_loss_jumped(session.config, training.train.count),
        rose=how_to_restart_smoothly(session.config),
    )
    display.facts({**header(session, resolved), "run": str(folder.path)})
    record = Record(session, folder, begun)
    for tracker in record.requested:
        display.command(tracker.name, tracker.where)
    pulse = runs.Heartbeat(folder.beat, seconds=runs.HEARTBEAT)
    pulse.start()
    try:
        with StopSignals(lambda number: display.say(_heard(number))) as signals:
            try:
                _train(session, record, display, signals, limit, fresh=begun is None)
                finish(session, folder, display, record)
                signals.leaving = True  # the results are complete: a late signal does not undo them
                conclude(session, folder, display, record.summary)
            except (KeyboardInterrupt, StoppedError) as end:
                signals.leaving = True
                at_once = not isinstance(end, StoppedError)
                raise _stopped(session, record, display, signals, saved=not at_once) from None
    except (InterruptedRunError, PreemptedRunError) as stop:
        display.note(str(stop))
        raise
    except BaseException as error:
        with contextlib.suppress(OSError, OutOfSpaceError):  # the disk may be what failed
            folder.status("diverged" if isinstance(error, DivergedError) else "failed")
        raise
    finally:
        pulse.stop()
        record.close()
        display.close()
    if as_json:
        print(to_json(record.summary))


def _heard(number: int) -> str:
    """Acknowledge a signal at once."""
    name = signal.Signals(number).name
    again = "; press again to stop at once, without saving" if number == signal.SIGINT else ""
    return f"{'Ctrl-C' if number == signal.SIGINT else name}: finishing the step, then saving{again}"


def _train(
    session: Session, record: Record, display: Display, signals: StopSignals, limit: TimeLimit, *, fresh: bool
) -> None:
    """Train through the plan and record events. Raises StoppedError, with the state saved, if a signal asks to stop."""
    hear(session.training, signals)
    if fresh:
        record.open()
        session.training.train.first = functools.partial(_draw_first, session, record.folder)
    if math.isfinite(session.training.progress.best_top1):  # score of the initial weights, or from before a stop
        display.position.best = session.training.progress.best_top1
    told = False
    device = session.training.runtime.device.type
    pace = PaceWatch(session.config.data.batch_size, threads=torch.get_num_threads(), device=device)
    try:
        with display:
            for event in fit(session.training):
                record.take(event)
                display.show(event)
                announce(event)
                pace.take(event)
                if session.training.graphs and session.training.graphs.refused and not told:
                    told = True
                    display.say(f"steps run one by one: no CUDA graph ({session.training.graphs.refused})")
                if limit.passed() and not signals.received:
                    signals.received, signals.reason = signal.SIGTERM, str(limit)
                if _stops(session, event, signals):
                    raise StoppedError
        if session.training.out_of_patience:
            epochs = count(session.training.progress.since_best, "epoch")
            display.say(f"ended after {epochs} without a better validation top-1 (run.patience)")
            record.summary["ended_early"] = True
        leave_ranks()  # the rest is for the first rank only
    except StoppedError:
        if session.training.progress.whole:  # within a restart, the state is the one saved after the last epoch
            record.save_last()
        leave_ranks()
        raise


def _draw_first(session: Session, folder: runs.RunDirectory, batch: Batch) -> None:
    """Draw a picture of a run's first training batch; this changes no random number of the run."""
    with warned(f"no {mosaic.NAME}"):
        mosaic.draw(session, folder, batch)


def hear(training: Training, signals: StopSignals) -> None:
    """Let a run check for signals wherever it may wait long.

    A rank that is asked to stop does so together with the others, after an update, unless its images do not arrive.
    """
    if training.runtime.ranks == 1:
        training.stop = signals
    for images in filter(None, (training.train, training.val, training.test)):
        images.stop = signals if training.runtime.ranks == 1 else _Patient(signals)


class _Patient:
    """Raises LostRankError if a rank that was asked to stop still waits for images after `ALONE_AFTER` seconds."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals, self.since = signals, 0.0

    def __call__(self) -> bool:
        if not self.signals():
            return False
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > ALONE_AFTER:
            raise LostRankError("asked to stop while no images arrived: continue from the last save with --resume")
        return False


def follow(session: Session) -> None:
    """Train as one of the ranks that neither write nor report."""
    try:
        with StopSignals() as signals:
            hear(session.training, signals)
            for event in fit(session.training):
                if isinstance(event, StepEnd):
                    saves_at(session, event)
                if _stops(session, event, signals):
                    raise StoppedError
    except StoppedError:
        leave_ranks()
        raise PreemptedRunError from None
    leave_ranks()


def _stops(session: Session, event: Event, signals: StopSignals) -> bool:
    """Return whether the run stops here. If one rank was asked to stop, all stop after the same update."""
    machine = session.training.runtime
    if machine.ranks == 1:
        return signals()
    if not isinstance(event, StepEnd):
        return False
    every = 1 if machine.device.type == "cpu" else STEPS_BETWEEN_STOPS
    if event.step // every == (event.step - session.training.accumulate) // every:
        return False
    asked = [signals.received == signal.SIGINT, signals.received not in (None, signal.SIGINT)]
    by_hand, by_others = summed(torch.tensor(asked, dtype=torch.float32, device=machine.device)).tolist()
    if not by_hand and not by_others:
        return False
    signals.received = signals.received or (signal.SIGTERM if by_others else signal.SIGINT)
    pool(session)
    return True


def _stopped(
    session: Session, record: Record, display: Display, signals: StopSignals, *, saved: bool
) -> InterruptedRunError | PreemptedRunError:
    """Mark the run as one that can be resumed, and return the error that explains how."""
    folder, summary = record.folder, record.summary
    asked = None if signals.received == signal.SIGINT else signals.received
    folder.status("preempted" if asked else "interrupted")
    with warned("no curves.png"):
        draw(session, folder, display, summary)
    ranks = session.training.runtime.ranks
    command = "repan" if ranks == 1 else f"torchrun --standalone --nproc-per-node {ranks} -m repan_cli"
    how = f"continue with: {command} {session.command} --resume {quoted(folder.path)}{session.own_code_again}"
    if not saved:
        return InterruptedRunError(f"stopped at once, without saving; the last save is whole: {how}", folder.path)
    if asked:
        reason = signals.reason or f"by {signal.Signals(asked).name}"
        return PreemptedRunError(f"stopped {reason}, everything is saved; {how}")
    return InterruptedRunError(f"interrupted, everything is saved; {how}", folder.path)
