"""Compute the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable

from repan_cli.config.settings import OptimConfig
from repan_cli.registry import Registry

Schedule = Callable[[float], float]
SCHEDULES: Registry[Schedule] = Registry("schedule")
"""Functions from progress in [0, 1] to a factor in [0, 1]: 1 is the peak rate, 0 is `optim.min_lr`."""


@SCHEDULES.register("cosine")
def cosine(progress: float) -> float:
    """Half a cosine (SGDR, Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register("linear")
def linear(progress: float) -> float:
    """A straight line down."""
    return 1 - progress


@SCHEDULES.register("step")
def step(progress: float) -> float:
    """A tenth of the peak rate after half of the schedule, a hundredth after three quarters."""
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))


@SCHEDULES.register("constant")
def constant(progress: float) -> float:
    """The peak rate throughout."""
    return 1.0


def learning_rate(optim: OptimConfig, elapsed: float, length: float) -> float:
    """Return the learning rate `elapsed` epochs into a schedule of `length` epochs with a linear warm-up."""
    warmup = min(optim.warmup_epochs, length)
    if elapsed < warmup:
        return optim.lr * elapsed / warmup
    progress = min(1.0, (elapsed - warmup) / max(length - warmup, 1e-12))
    return optim.min_lr + (optim.lr - optim.min_lr) * SCHEDULES[optim.schedule](progress)
