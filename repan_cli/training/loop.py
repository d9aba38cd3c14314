"""Train: a generator of events that hold floats and names only. It prints nothing and writes nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from repan_cli.anneal.rescaling import rescale
from repan_cli.anneal.restart import RestartReport, restart
from repan_cli.config.settings import CycleConfig
from repan_cli.data.batches import Batch
from repan_cli.errors import DivergedError, StoppedError
from repan_cli.runs import felt
from repan_cli.system.copies import deep_copy
from repan_cli.system.notices import doing
from repan_cli.system.seeding import generator_for, seed_for, seed_generators
from repan_cli.training import optim
from repan_cli.training.evaluation import Score, eval_batch, evaluate
from repan_cli.training.events import CycleEnd, CycleStart, Epoch, Event, LossLog, StepEnd
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Totals
from repan_cli.training.run import Training
from repan_cli.training.step import recorded_as, storage, update
from repan_cli.training.tasks import Task

FIRST_STEPS = 10
LEAST_SCALE = 2**-3
LOOK_IMAGES = 256


def fit(run: Training) -> Generator[Event, None, None]:
    """Train through the plan, starting at `run.progress`, in place. The caller logs and saves from the events.

    Raises DivergedError if the loss or a gradient is not finite, StoppedError if `run.stop` returns true.
    """
    for phase in run.plan[run.progress.phase :]:
        if run.out_of_patience and not run.progress.begun:
            return
        task = run.task_of(phase)
        optim.apply_settings(run.optimizer, phase.optim)
        if run.graphs is not None:
            run.graphs.enter(recorded_as(phase, task), storage(run))
        if not run.progress.begun:
            yield _begin(run, phase, task)
        while run.progress.epoch < phase.epochs and not run.out_of_patience:
            yield from _epoch(run, phase, task)
        if run.progress.best_weights is not None:
            for model in {run.model, run.scored}:
                model.load_state_dict(run.progress.best_weights)
        end = _end(run, phase)
        run.progress.next_phase()
        yield end


def _epoch(run: Training, phase: Phase, task: Task) -> Generator[Event, None, None]:
    """Train and score an epoch. When its event is yielded, `progress` is already at the start of the next epoch."""
    progress, began = run.progress, time.perf_counter()
    result = yield from _train_epoch(run, phase, task)
    score = evaluate(run.scored, run.val, run.stop, run.graphs) if run.val else None
    best = score is not None and score.top1 > progress.best_top1
    if score is not None and best:
        progress.best_top1 = score.top1
    progress.since_best = 0 if best else progress.since_best + 1
    _keep_best(run, phase, score)
    progress.epoch, progress.step, progress.totals = progress.epoch + 1, 0, None
    progress.seconds += time.perf_counter() - began
    yield Epoch(
        cycle=phase.cycle,
        epoch=progress.epoch,
        loss=result.loss,
        first_loss=result.first_loss,
        train_top1=result.top1,
        val_top1=score.top1 if score else None,
        val_loss=score.loss if score else None,
        lr=result.lr,
        attach_rate=result.attach_rate,
        images_per_second=result.images_per_second,
        best=best,
        steps=run.train.steps(run.batch_size),
        **result.felt,
    )


def _keep_best(run: Training, phase: Phase, score: Score | None) -> None:
    """Keep the weights that the next phase starts from, if they are not the last ones."""
    if phase.start_from == "last":
        return
    judged = evaluate(run.scored, run.test, run.stop, run.graphs) if phase.start_from == "best-test" else score
    if judged is not None and judged.top1 > run.progress.best_of_phase:
        run.progress.best_of_phase = judged.top1
        run.progress.best_weights = {name: value.clone() for name, value in run.scored.state_dict().items()}


def _end(run: Training, phase: Phase) -> CycleEnd:
    began = time.perf_counter()
    val = evaluate(run.scored, run.val, run.stop) if run.val else None
    test = evaluate(run.scored, run.test, run.stop)
    seconds = run.progress.seconds + time.perf_counter() - began
    return CycleEnd(phase.cycle, val.top1 if val else None, test.top1, test.top5, test.loss, seconds)


# ---------------------------------------------------------------------------------------------- the restart


def _begin(run: Training, phase: Phase, task: Task) -> CycleStart:
    """Restart before a cycle, and measure the effect on the whole network."""
    if phase.cycle == 0:
        run.progress.begun = True
        return CycleStart(0)
    run.progress.whole, began = False, time.perf_counter()
    with doing("scoring before"):
        before = _look(run, phase, task)
    with doing("regrowing"):
        report = _boundary(run, phase)
    if phase.carries_momentum:
        optim.carry_momentum(run.optimizer, report.changes)
    else:
        optim.zero_momentum(run.optimizer)
    if run.ema:
        run.ema.set(run.model)  # type: ignore[no-untyped-call] # timm's
    with doing("scoring after"):
        after = _look(run, phase, task)
    run.progress.begun = run.progress.whole = True
    run.progress.seconds = time.perf_counter() - began
    return CycleStart(
        cycle=phase.cycle,
        restarted=phase.restarts,
        blocks=report.blocks,
        zero_gammas=report.zero_gammas,
        top1_before=before.top1,
        top1_after_restart=after.top1,
        loss_before=before.loss,
        loss_after_restart=after.loss,
        logit_error=((after.logits - before.logits).abs().max() / before.logits.abs().max()).item(),
        carried=phase.carries_momentum,
    )


class _Look(NamedTuple):
    top1: float | None
    loss: float
    logits: Tensor


@torch.no_grad()
def _look(run: Training, phase: Phase, task: Task) -> _Look:
    """Measure validation top-1, the loss of a first batch in train mode, and the logits.

    The loss is that of a copy, because train mode changes BN statistics.
    """
    batch = next(run.train.training_batches(max(run.batch_size, LOOK_IMAGES), run.seed, phase.data_cycle(), 1))
    loss, _ = task(deep_copy(run.model).train(), batch)
    top1 = evaluate(run.model, run.val, run.stop).top1 if run.val else None
    return _Look(top1, loss.item(), run.model.eval()(batch.images))


def _boundary(run: Training, phase: Phase) -> RestartReport:
    """Restart the network or rescale its trunks, whichever the phase begins with."""
    if phase.restart:
        return _restart(run, phase.cycle, phase.restart)
    return rescale(run.model, only=run.restarted) if phase.rescales else RestartReport(blocks=0)


def _restart(run: Training, cycle: int, settings: CycleConfig) -> RestartReport:
    return restart(
        run.model,
        rule=settings.rule,
        images=_calibration_images(run, cycle, settings.calibration_images),
        attach=settings.attach,
        branch_init=settings.branch_init,
        trunk_scale=settings.trunk_scale,
        only=run.restarted,
        generator=generator_for("branches", run.seed, cycle),
    )


def _calibration_images(run: Training, cycle: int, count: int) -> Iterator[Tensor]:
    """Yield `count` augmented training images, or as many as there are, drawn for this cycle."""
    for batch in run.train.training_batches(eval_batch(run.train), run.seed, cycle, 0):  # epochs count from 1
        if run.stop():
            raise StoppedError
        yield batch.images[: -(-count // run.runtime.ranks)]
        count -= len(batch.images) * run.runtime.ranks
        if count <= 0:
            return


# ---------------------------------------------------------------------------------------------- an epoch


@dataclass(frozen=True)
class _EpochResult:
    loss: float
    first_loss: float
    top1: float
    lr: float
    attach_rate: float
    images_per_second: float
    felt: dict[str, float | None]


def _train_epoch(run: Training, phase: Phase, task: Task) -> Generator[Event, None, _EpochResult]:
    """Train on the remaining images of an epoch, and return its figures."""
    run.model.train()
    progress, epoch = run.progress, run.progress.epoch + 1
    steps = run.train.steps(run.batch_size)
    marks = felt.marks(steps)
    progress.totals = totals = progress.totals or Totals.zeros(run.runtime.device)
    seen, began = totals.images, time.perf_counter()
    place = run.seed, phase.data_cycle(), epoch
    batches = run.train.training_batches(run.batch_size, *place, first=progress.step)
    last = (steps - 1) // run.accumulate * run.accumulate
    lr, rate = _position(phase, epoch - 1 + last / steps)
    for group in _groups(task.prepared(batches), run.accumulate):
        elapsed = epoch - 1 + progress.step / steps
        lr, rate = _position(phase, elapsed)
        seed_generators(run.runtime.device, seed_for("step", run.seed, phase.cycle, epoch, progress.step))
        update(run, phase, task, group, elapsed)
        before, progress.step = progress.step, progress.step + len(group)
        if before < FIRST_STEPS <= progress.step or progress.step == steps < FIRST_STEPS:
            totals.first_loss = totals.mean_loss()
        for number, mark in enumerate(marks):
            if before < mark <= progress.step:
                totals.note(number)
        if progress.step // run.log_every > before // run.log_every or progress.step == steps:
            _check_scale(run)
            loss = totals.mean_loss()  # waits for the device: speed counts finished work only
            speed = (totals.images - seen) * run.runtime.ranks / (time.perf_counter() - began)
            yield LossLog(phase.cycle, epoch, progress.step, loss, lr, rate, speed)
        yield StepEnd(phase.cycle, epoch, progress.step)
    loss = totals.mean_loss()
    speed = (totals.images - seen) * run.runtime.ranks / (time.perf_counter() - began)
    return _EpochResult(loss, totals.first_loss, totals.top1(), lr, rate, speed, totals.felt())


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield the batches of each update."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def _position(phase: Phase, elapsed: float) -> tuple[float, float]:
    """Return the learning rate and the attach rate `elapsed` epochs into the phase."""
    rate = phase.attach_rate(elapsed)
    return phase.learning_rate(elapsed), 1.0 if rate is None else rate


def _check_scale(run: Training) -> None:
    """Raise DivergedError if the loss scale has collapsed: it starts at 2 ** 16 and halves with each overflow
    in a row.
    """
    if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:
        raise DivergedError("gradients overflow in fp16 however the loss is scaled; set run.precision=bf16 or fp32")
