"""Events of the training loop, which hold floats and names only. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CycleStart:
    """A phase begins. Before a cycle: what its restart did to the function, which should be nothing, and whether the
    optimizer's memory was `carried` over.

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
    carried: bool = False


@dataclass(frozen=True)
class LossLog:
    """A look at the loss, every `log_every` steps. `step` counts from 1."""

    cycle: int
    epoch: int
    step: int
    loss: float
    lr: float
    attach_rate: float
    images_per_second: float


@dataclass(frozen=True)
class StepEnd:
    """The end of an optimizer step. Here a run can be stopped, and resumed as if it had not been stopped."""

    cycle: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, which counts from 1. `first_loss` is the mean loss of its first 10 steps.

    The last three are the epoch's share in windows of 50 or 200 steps that begin or end with an epoch, see `felt`: the
    mean loss of its first 50, first 200 and last 200 steps; in an epoch of fewer, of as many as whole epochs leave of
    the window, 50 or 200 modulo `steps`, and None where nothing is left.
    """

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
    steps: int
    loss_head_50: float | None
    loss_head_200: float | None
    loss_tail_200: float | None


@dataclass(frozen=True)
class CycleEnd:
    """The end of a phase, with the weights that the next one starts from: validation and test figures in percent."""

    cycle: int
    top1: float | None
    test_top1: float
    test_top5: float | None
    test_loss: float
    seconds: float


Event = CycleStart | LossLog | StepEnd | Epoch | CycleEnd
