"""Define the events of the training loop. They hold only floats and names; this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CycleStart:
    """The start of a phase, with the effect of its restart, which should be none.

    The figures are validation top-1, and the loss in train mode on the same images, before and after the restart.
    `logit_error` tells how far the restart moved the logits in eval mode. `carried` is true if the optimizer's state
    was carried over.
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
    """The loss at a step, every `log_every` steps. `step` counts from 1."""

    cycle: int
    epoch: int
    step: int
    loss: float
    lr: float
    attach_rate: float
    images_per_second: float


@dataclass(frozen=True)
class StepEnd:
    """The end of an optimizer step. A run can be stopped here, and resumed with the same result as without the stop."""

    cycle: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, which counts from 1. `first_loss` is the mean loss of its first 10 steps.

    The last three figures are mean losses over the epoch's first 50, first 200 and last 200 steps; see `felt`. An epoch
    with fewer steps contributes a part of such a window. Whole epochs are taken from the window as often as they fit,
    and the figure is the mean over the rest, 50 or 200 modulo `steps`. It is None if the rest is 0.
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
    """The end of a phase, with figures of the weights that the next one starts from: validation and test, in
    percent.
    """

    cycle: int
    top1: float | None
    test_top1: float
    test_top5: float | None
    test_loss: float
    seconds: float


Event = CycleStart | LossLog | StepEnd | Epoch | CycleEnd
