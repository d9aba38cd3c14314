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
    """The end of an epoch, with its figures. Accuracies are in percent.

    Attributes:
        cycle: the number of the phase; 0 is the baseline, or the only phase of `train` and `distill`.
        epoch: the number of the epoch in its phase, from 1.
        loss: the mean training loss.
        first_loss: the mean training loss of the first 10 steps.
        train_top1: top-1 on the augmented training images.
        val_top1: top-1 on the validation part; None if there is none.
        val_loss: the loss on the validation part; None if there is none.
        lr: the learning rate of the last step.
        attach_rate: the attach rate of the last step.
        images_per_second: training images per second.
        best: true if `val_top1` is the best of the run so far.
        steps: the number of training steps.
        loss_head_50: the mean training loss of the first 50 steps. An epoch with fewer steps contributes a part of such
            a window. Whole epochs are taken from the window as often as they fit, and the figure is the mean over the
            rest, 50 modulo `steps`. It is None if the rest is 0.
        loss_head_200: the same of the first 200 steps.
        loss_tail_200: the same of the last 200 steps.
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
