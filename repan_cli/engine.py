"""The training loop: a generator of events that hold floats and names only. It prints nothing and writes nothing."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli import anneal, optim
from repan_cli.anneal import Phase
from repan_cli.blocks import attach_rates
from repan_cli.data.source import Batch, Source
from repan_cli.errors import DivergedError, InputError, StoppedError
from repan_cli.graphs import Graphs
from repan_cli.runtime import Runtime, generator, key, summed
from repan_cli.state import Progress, Totals
from repan_cli.tasks import Task
from repan_cli.update import recorded_as, storage, update

EVAL_BATCH, EVAL_PIXELS = 1000, 1000 * 64 * 64
"""Bounds on the images, and on their pixels, of a batch that is only looked at."""

FIRST_STEPS = 10
LEAST_SCALE = 2**-3
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
class Updated:
    """The optimizer has made a step: here a run can be stopped, and go on later as if it had not been."""

    cycle: int
    epoch: int
    step: int


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


Event = CycleStart | Step | Updated | Epoch | CycleEnd


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and mean cross-entropy over `images` images."""

    top1: float
    top5: float
    loss: float
    images: int


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: nn.Module, images: Source, stop: Callable[[], bool] = bool, graphs: Graphs | None = None) -> Score:
    """Score a network in eval mode, in float32: the same weights give the same figures wherever they are reported.

    `graphs`: record it, for a network that is scored often. Raises StoppedError, between two batches, when `stop` says
    so.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, device=images.device)
    for batch, labels, *_ in images.batches(eval_batch(images)):
        if stop():
            model.train(was_training)
            raise StoppedError
        if graphs is None:
            totals += score_batch(model(batch), labels)
        else:
            key = ("evaluate", model, batch.shape)
            totals += graphs(key, lambda given: score_batch(model(given[0]), given[1]), (batch, labels))
    model.train(was_training)
    if images.ranks > 1:
        totals = summed(totals)
    return score_of(totals, images.count)


def score_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, (3,): top-1 hits, top-5 hits, cross-entropy."""
    if not isinstance(logits, Tensor):
        raise InputError(f"the network returns a {type(logits).__name__}, not one tensor of logits")
    ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([ranks[:, 0].sum(), ranks.sum(), loss])


def score_of(totals: Tensor, count: int) -> Score:
    """The score that the sums over `count` images mean."""
    top1, top5, loss = (value / count for value in totals.tolist())
    return Score(100 * top1, 100 * top5, loss, count)


def eval_batch(images: Source) -> int:
    """How many images are looked at together."""
    return max(1, min(EVAL_BATCH, EVAL_PIXELS // images.size**2))


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Training:
    """Everything the loop works on.

    `task_of` gives the task of a phase, asked once as the phase begins, before its restart: baseline and cycles may
    differ in it, and a teacher may be the network as it is then. `val` None means that nothing was held
    out to choose by. `restarted` names the blocks that restart; None is all. `wrapped` is the network as training
    calls it, compiled for one; None is the network itself. `ema`: a weight average that is scored in its stead.
    `accumulate`: how many batches an update takes. `graphs`: where updates are recorded and replayed; None does them as
    they are. `stop` is asked wherever the run may take long without an event.
    """

    model: nn.Module
    task_of: Callable[[Phase], Task]
    optimizer: torch.optim.Optimizer
    plan: tuple[Phase, ...]
    train: Source
    val: Source | None
    test: Source
    runtime: Runtime
    batch_size: int
    restarted: frozenset[str] | None = None
    seed: int = 0
    log_every: int = 20
    accumulate: int = 1
    wrapped: nn.Module | None = None
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    progress: Progress = field(default_factory=Progress)
    graphs: Graphs | None = None
    stop: Callable[[], bool] = bool

    def __post_init__(self) -> None:
        if self.graphs is not None:
            optim.rates_to_device(self.optimizer, self.runtime.device)

    @cached_property
    def attach_rates(self) -> list[Tensor]:
        """Of the blocks that restart."""
        return attach_rates(self.model, only=self.restarted)

    @cached_property
    def trunk_live(self) -> Tensor | None:
        """On the device 0 while trunks are frozen, 1 else, for recorded updates of a run that freezes them."""
        if self.graphs is None or not any(phase.trunk_is_frozen(0) for phase in self.plan):
            return None
        return torch.ones((), device=self.runtime.device)

    @cached_property
    def norms(self) -> list[_BatchNorm]:
        """The layers that count their batches and do not need that number."""
        norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm))
        return [norm for norm in norms if norm.num_batches_tracked is not None and norm.momentum is not None]

    @property
    def called(self) -> nn.Module:
        """The network as training calls it."""
        return self.model if self.wrapped is None else self.wrapped

    @property
    def scored(self) -> nn.Module:
        """The network whose accuracy counts and that is saved."""
        return self.ema.module if self.ema else self.model


def fit(run: Training) -> Iterator[Event]:
    """Train through the plan, from where `run.progress` stands. The caller logs and saves from the events; the model is
    trained in place.

    Raises DivergedError when the loss or a gradient stops being finite, StoppedError when `run.stop` says so.
    """
    for phase in run.plan[run.progress.phase :]:
        task = run.task_of(phase)
        optim.apply_settings(run.optimizer, phase.optim)
        if run.graphs is not None:
            run.graphs.enter(recorded_as(phase, task), storage(run))
        if not run.progress.begun:
            yield _begin(run, phase, task)
        while run.progress.epoch < phase.epochs:
            yield from _epoch(run, phase, task)
        if run.progress.best_weights is not None:
            for model in {run.model, run.scored}:
                model.load_state_dict(run.progress.best_weights)
        end = _end(run, phase)
        run.progress.next_phase()
        yield end


def _epoch(run: Training, phase: Phase, task: Task) -> Iterator[Event]:
    """Train and score an epoch. Its event comes with a `progress` from which the next one would begin."""
    progress, began = run.progress, time.perf_counter()
    result = yield from _train_epoch(run, phase, task)
    score = evaluate(run.scored, run.val, run.stop, run.graphs) if run.val else None
    best = score is not None and score.top1 > progress.best_top1
    if best:
        progress.best_top1 = score.top1
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
    )


def _keep_best(run: Training, phase: Phase, score: Score | None) -> None:
    """Keep the weights that the next phase starts from, where those are not the last."""
    if phase.start_from == "last":
        return
    judged = evaluate(run.scored, run.test, run.stop, run.graphs) if phase.start_from == "best-test" else score
    if judged.top1 > run.progress.best_of_phase:
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
    """Before a cycle the restart, watched from outside."""
    if phase.cycle == 0:
        run.progress.begun = True
        return CycleStart(0)
    run.progress.whole, began = False, time.perf_counter()
    before = _look(run, phase, task)
    report = _restart(run, phase) if phase.restarts else anneal.RestartReport(blocks=0)
    optim.zero_momentum(run.optimizer)
    if run.ema:
        run.ema.set(run.model)
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
    top1 = evaluate(run.model, run.val, run.stop).top1 if run.val else None
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
    """`count` augmented training images, or as many as there are, drawn for this cycle."""
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


def _train_epoch(run: Training, phase: Phase, task: Task) -> Iterator[Event]:
    """The rest of a pass over the training images; returns the epoch's figures."""
    run.model.train()
    progress, epoch = run.progress, run.progress.epoch + 1
    steps = run.train.steps(run.batch_size)
    progress.totals = totals = progress.totals or Totals.zeros(run.runtime.device)
    seen, began = totals.images, time.perf_counter()
    place = run.seed, phase.data_cycle(), epoch
    batches = run.train.training_batches(run.batch_size, *place, first=progress.step)
    last = (steps - 1) // run.accumulate * run.accumulate
    lr, rate = _position(phase, epoch - 1 + last / steps)
    for group in _groups(task.prepared(batches), run.accumulate):
        elapsed = epoch - 1 + progress.step / steps
        lr, rate = _position(phase, elapsed)
        torch.manual_seed(key("step", run.seed, phase.cycle, epoch, progress.step))
        update(run, phase, task, group, elapsed)
        before, progress.step = progress.step, progress.step + len(group)
        if before < FIRST_STEPS <= progress.step or progress.step == steps < FIRST_STEPS:
            totals.first_loss = totals.mean_loss()
        if progress.step // run.log_every > before // run.log_every or progress.step == steps:
            speed = (totals.images - seen) * run.runtime.ranks / (time.perf_counter() - began)
            _check_scale(run)
            yield Step(phase.cycle, epoch, progress.step, totals.mean_loss(), lr, rate, speed)
        yield Updated(phase.cycle, epoch, progress.step)
    speed = (totals.images - seen) * run.runtime.ranks / (time.perf_counter() - began)
    return _EpochResult(totals.mean_loss(), totals.first_loss, totals.top1(), lr, rate, speed)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of each update."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def _position(phase: Phase, elapsed: float) -> tuple[float, float]:
    """Learning rate and attach rate `elapsed` epochs into the phase."""
    rate = phase.attach_rate(elapsed)
    return phase.learning_rate(elapsed), 1.0 if rate is None else rate


def _check_scale(run: Training) -> None:
    """The scaler halves the loss scale whenever a gradient overflows: from 2 ** 16, twenty times in a row."""
    if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:
        raise DivergedError("gradients overflow in fp16 however the loss is scaled; set run.precision=bf16 or fp32")
