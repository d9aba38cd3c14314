"""The training loop: a generator of events that hold floats and names only. It prints nothing and writes nothing."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli import anneal, optim
from repan_cli.anneal import Phase
from repan_cli.blocks import set_attach_rate
from repan_cli.data.resident import Batch, ResidentImages
from repan_cli.errors import DivergedError, InputError
from repan_cli.runtime import Runtime, generator, key
from repan_cli.tasks import Task

EVAL_BATCH, EVAL_PIXELS = 1000, 1000 * 64 * 64
"""Bounds on the images, and on their pixels, of a batch that is only looked at."""

FIRST_STEPS = 10
LOOK_IMAGES = 256


# ---------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class CycleStart:
    """A phase begins. Before a cycle: what its restart did to the function, which should be nothing.

    Validation top-1 and the loss in train mode on the same images before and after it, and how far it moved the
    logits in eval mode.
    """

    cycle: int
    restarted: bool = False
    blocks: int = 0
    zero_gammas: int = 0
    top1_before: float | None = None
    top1_after_restart: float | None = None
    loss_before: float | None = None
    loss_after_restart: float | None = None
    logit_error: float | None = None


@dataclass(frozen=True)
class Step:
    """A look at the loss, every `log_every` steps. `step` counts from 1."""

    cycle: int
    epoch: int
    step: int
    loss: float
    lr: float
    attach_rate: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, which counts from 1. `first_loss` is the mean loss of its first steps."""

    cycle: int
    epoch: int
    loss: float
    first_loss: float
    train_top1: float
    val_top1: float | None
    val_loss: float | None
    lr: float
    attach_rate: float
    images_per_second: float
    best: bool


@dataclass(frozen=True)
class CycleEnd:
    """The end of a phase, with the weights that the next one starts from: validation and test figures in percent."""

    cycle: int
    top1: float | None
    test_top1: float
    test_top5: float
    test_loss: float
    seconds: float


Event = CycleStart | Step | Epoch | CycleEnd


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and mean cross-entropy over `images` images."""

    top1: float
    top5: float
    loss: float
    images: int


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: nn.Module, images: ResidentImages) -> Score:
    """Score a network in eval mode, in float32: the same weights give the same figures wherever they are reported."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, device=images.labels.device)
    for batch, labels, *_ in images.batches(_eval_batch(images)):
        logits = model(batch)
        if not isinstance(logits, Tensor):
            raise InputError(f"the network returns a {type(logits).__name__}, not one tensor of logits")
        ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss])
    model.train(was_training)
    top1, top5, loss = (value / images.count for value in totals.tolist())
    return Score(100 * top1, 100 * top5, loss, images.count)


def _eval_batch(images: ResidentImages) -> int:
    return max(1, min(EVAL_BATCH, EVAL_PIXELS // images.size**2))


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Training:
    """Everything the loop works on.

    `task_of` gives the task of a phase, asked once as the phase begins, before its restart: baseline and cycles may
    differ in it, and a teacher may be the network as it is then. `val` None means that nothing was held
    out to choose by. `restarted` names the blocks that restart; None is all.
    """

    model: nn.Module
    task_of: Callable[[Phase], Task]
    optimizer: torch.optim.Optimizer
    plan: tuple[Phase, ...]
    train: ResidentImages
    val: ResidentImages | None
    test: ResidentImages
    runtime: Runtime
    batch_size: int
    restarted: frozenset[str] | None = None
    seed: int = 0
    log_every: int = 20
    best_top1: float = field(default=-math.inf, init=False)


def fit(run: Training) -> Iterator[Event]:
    """Train through the plan, phase by phase. The caller logs and saves from the events; the model is trained in place.

    Raises DivergedError when the loss stops being finite.
    """
    for phase in run.plan:
        began = time.perf_counter()
        task = run.task_of(phase)
        yield _begin(run, phase, task)
        best_of_cycle, best_weights = -math.inf, None
        for epoch in range(1, phase.epochs + 1):
            result = yield from _train_epoch(run, phase, task, epoch)
            score = evaluate(run.model, run.val) if run.val else None
            best = score is not None and score.top1 > run.best_top1
            if best:
                run.best_top1 = score.top1
            if score and score.top1 > best_of_cycle and _keeps_best(phase):
                best_of_cycle = score.top1
                best_weights = {name: value.clone() for name, value in run.model.state_dict().items()}
            yield _epoch_event(phase, epoch, result, score, best=best)
        if best_weights is not None:
            run.model.load_state_dict(best_weights)
        yield _end(run, phase, time.perf_counter() - began)


def _keeps_best(phase: Phase) -> bool:
    return phase.settings is not None and phase.settings.start_from == "best"


def _epoch_event(phase: Phase, epoch: int, result: _EpochResult, score: Score | None, *, best: bool) -> Epoch:
    return Epoch(
        cycle=phase.cycle,
        epoch=epoch,
        loss=result.loss,
        first_loss=result.first_loss,
        train_top1=result.top1,
        val_top1=score.top1 if score else None,
        val_loss=score.loss if score else None,
        lr=result.lr,
        attach_rate=result.attach_rate,
        images_per_second=result.images_per_second,
        best=best,
    )


def _end(run: Training, phase: Phase, seconds: float) -> CycleEnd:
    val = evaluate(run.model, run.val) if run.val else None
    test = evaluate(run.model, run.test)
    return CycleEnd(phase.cycle, val.top1 if val else None, test.top1, test.top5, test.loss, seconds)


def _begin(run: Training, phase: Phase, task: Task) -> CycleStart:
    """Settings of the phase, and before a cycle the restart, watched from outside."""
    optim.apply_settings(run.optimizer, phase.optim)
    if phase.cycle == 0:
        return CycleStart(0)
    before = _look(run, phase, task)
    report = _restart(run, phase) if phase.restarts else anneal.RestartReport(blocks=0)
    optim.zero_momentum(run.optimizer)
    after = _look(run, phase, task)
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
    )


class _Look(NamedTuple):
    top1: float | None
    loss: float
    logits: Tensor


@torch.no_grad()
def _look(run: Training, phase: Phase, task: Task) -> _Look:
    """Validation top-1, the loss of a first batch in train mode (of a copy: it would move statistics), its logits."""
    batch = next(run.train.training_batches(max(run.batch_size, LOOK_IMAGES), run.seed, phase.data_cycle(), 1))
    loss, _ = task(copy.deepcopy(run.model).train(), batch)
    top1 = evaluate(run.model, run.val).top1 if run.val else None
    return _Look(top1, loss.item(), run.model.eval()(batch.images))


def _restart(run: Training, phase: Phase) -> anneal.RestartReport:
    settings = phase.settings
    return anneal.restart(
        run.model,
        rule=settings.rule,
        images=_calibration_images(run, phase.cycle, settings.calibration_images),
        attach=settings.attach,
        branch_init=settings.branch_init,
        trunk_scale=settings.trunk_scale,
        only=run.restarted,
        generator=generator("branches", run.seed, phase.cycle),
    )


def _calibration_images(run: Training, cycle: int, count: int) -> Iterator[Tensor]:
    """`count` augmented training views, or as many as there are, drawn for this cycle."""
    plan = run.train.plan(run.seed, cycle, 0)  # training epochs count from 1
    device = run.runtime.device
    for index in plan.order[:count].to(device).split(_eval_batch(run.train)):
        yield run.train.gather(index, plan.views.to(device)[index])


@dataclass
class _Totals:
    """Sums over an epoch, on the device: reading them is a host-device sync."""

    loss: Tensor
    correct: Tensor
    images: int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.images += len(labels)
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def mean_loss(self) -> float:
        value = self.loss.item() / self.images
        if not math.isfinite(value):
            raise DivergedError("the training loss is no longer finite; lower optim.lr, or set optim.clip")
        return value


@dataclass(frozen=True)
class _EpochResult:
    loss: float
    first_loss: float
    top1: float
    lr: float
    attach_rate: float
    images_per_second: float


def _train_epoch(run: Training, phase: Phase, task: Task, epoch: int) -> Iterator[Step]:
    """One pass over the training images; returns the epoch's figures."""
    run.model.train()
    torch.manual_seed(key("dropout", run.seed, phase.cycle, epoch))
    steps = run.train.steps(run.batch_size)
    totals = _Totals(*torch.zeros(2, device=run.runtime.device))
    began, first_loss, lr, rate = time.perf_counter(), math.nan, 0.0, 1.0
    batches = run.train.training_batches(run.batch_size, run.seed, phase.data_cycle(), epoch)
    for step, batch in enumerate(batches, start=1):
        elapsed = epoch - 1 + (step - 1) / steps
        lr, rate = _set_position(run, phase, elapsed)
        loss, logits = _train_step(run, phase, task, batch, frozen=phase.trunk_is_frozen(elapsed))
        totals.add(loss, logits, batch.labels)
        if step == min(FIRST_STEPS, steps):
            first_loss = totals.mean_loss()
        if step % run.log_every == 0 or step == steps:
            loss, speed = totals.mean_loss(), totals.images / (time.perf_counter() - began)
            yield Step(phase.cycle, epoch, step, loss, lr, rate, speed)
    return _EpochResult(loss, first_loss, 100 * totals.correct.item() / totals.images, lr, rate, speed)


def _set_position(run: Training, phase: Phase, elapsed: float) -> tuple[float, float]:
    """Set learning rate and attach rate for a step that begins `elapsed` epochs into the phase."""
    lr, rate = phase.learning_rate(elapsed), phase.attach_rate(elapsed)
    optim.set_learning_rate(run.optimizer, lr)
    if rate is None:
        return lr, 1.0
    set_attach_rate(run.model, rate, only=run.restarted)
    return lr, rate


def _train_step(run: Training, phase: Phase, task: Task, batch: Batch, *, frozen: bool) -> tuple[Tensor, Tensor]:
    with run.runtime.autocast():
        loss, logits = task(run.model, batch)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if frozen:
        optim.drop_trunk_gradients(run.optimizer)
    optim.clip_gradients(run.optimizer, phase.optim)
    run.optimizer.step()
    return loss, logits
