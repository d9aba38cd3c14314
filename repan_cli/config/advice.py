"""Give advice on settings that are unusual or have no effect. They are not wrong, but few users want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repan_cli.config.settings import Config, baseline_phase
from repan_cli.system.text import count

ADAPTIVE = ("adam", "nadam", "radam", "adan", "adabelief", "lion", "lamb", "sophia", "rmsprop", "adopt")
"""Beginnings of the names of optimizers whose steps are as large as their rate, whatever the gradient is."""

LARGE_RATE, USUAL_RATE = 0.02, 0.001

OF_RESTARTS = ("rule", "calibration_images", "attach", "attach_epochs", "freeze_trunk", "branch_init", "trunk_scale")
"""Settings of `cycle` that only a restart reads."""


def unusual(config: Config) -> Iterator[str]:
    """Yield settings that are unusual."""
    phases = {"optim": config.optim, "baseline.optim": baseline_phase(config).optim}
    said = set()
    for key, optim in phases.items():
        if optim.name.startswith(ADAPTIVE) and optim.lr > LARGE_RATE and (optim.name, optim.lr) not in said:
            said.add((optim.name, optim.lr))
            yield f"{key}.lr={optim.lr:g} is far above the usual rate for {optim.name}, about {USUAL_RATE}"


def without_effect(config: Config, given: Mapping[str, Any], *, cycles: bool) -> Iterator[str]:
    """Yield given settings that have no effect because of other settings, each with the reason."""
    for key in given:
        why = _why_not(config, key, cycles=cycles)
        if why is not None:
            yield f"{key} has no effect {why}"


def longer(config: Config, given: Mapping[str, Any], *, cycles: bool) -> Iterator[str]:
    """Yield a baseline that is longer than the given epochs, which are those of a cycle."""
    baseline = baseline_phase(config).epochs
    only = cycles and "epochs" in given and "baseline.epochs" not in given and config.model.init is None
    if only and baseline > config.epochs:
        yield f"--epochs is the length of a cycle; the baseline keeps its {baseline} epochs: set --baseline-epochs"


def _why_not(config: Config, key: str, *, cycles: bool) -> str | None:
    section, _, name = key.rpartition(".")
    cycle = config.cycle
    if section == "cycle" and cycles:
        if cycle.restart != "repan" and name in OF_RESTARTS:
            return f"with cycle.restart={cycle.restart}"
        if name == "attach_epochs" and cycle.attach != "ramp" and not cycle.freeze_trunk:
            return f"with cycle.attach={cycle.attach}, which has no ramp"
        if name in ("calibration_images", "trunk_scale") and cycle.rule != "calibrate":
            return f"with cycle.rule={cycle.rule}"
        if name == "momentum" and cycle.momentum == "carry" and cycle.restart == "rescale":
            return "with cycle.restart=rescale, which zeroes the momentum"
    taught = config.teacher.name or config.baseline.get("teacher.name")
    if section == "teacher" and name != "name" and not taught:
        return "without a teacher: give --teacher"
    if key == "ema.decay" and not config.ema.enabled:
        return "while ema.enabled is false"
    if key in ("optim.nesterov", "optim.momentum") and config.optim.name.startswith(ADAPTIVE):
        return f"on optim.name={config.optim.name}"
    return None


FEW_STEPS, FEW_IMAGES = 4, 200
"""The numbers of batches in an epoch, and of calibration images, below which the BN statistics of a restart are
rough.
"""


def why_loss_jumped(config: Config, images: int) -> str:
    """Explain a training loss that rose across a restart, by the settings of the run and its training images."""
    cycle, batch = config.cycle, config.data.batch_size
    chosen = [f"cycle.rule={cycle.rule}"] * (cycle.rule != "calibrate") + ["cycle.attach=one"] * (cycle.attach == "one")
    if chosen:
        return f"{' and '.join(chosen)} changed the function in train mode; the defaults do not"
    causes = []
    if images < FEW_STEPS * batch:
        causes.append(f"{count(images, 'training image')} in batches of {batch} are few: set a smaller --batch-size")
    measured = min(images, cycle.calibration_images)
    if measured < FEW_IMAGES:
        more = "raise cycle.calibration_images" if measured < images else "more training images help"
        causes.append(f"The statistics were measured on {count(measured, 'image')}: {more}")
    causes.append("Or train longer before the restart" if causes else "train longer before it")
    kept = "the restart kept the function in eval mode only, as the BN statistics had not settled"
    return f"{kept}{': ' if len(causes) == 1 else '. '}{'. '.join(causes)}"


def how_to_restart_smoothly(config: Config) -> str:
    """Name the settings with which the training loss rises less in the first steps after a restart."""
    wanted = {"schedule": "continuous", "rule": "calibrate", "trunk_scale": "pace", "momentum": "carry"}
    others = [f"cycle.{key}={value}" for key, value in wanted.items() if getattr(config.cycle, key) != value]
    if not others:
        return "a lower learning rate keeps it lower"
    return f"with {', '.join(others)} or a lower learning rate it rises less"
