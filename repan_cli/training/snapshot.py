"""Save and restore the state of a run beyond its weights: the tensors and plain values in `last.pt`.

Everything random is determined by position. So four things are enough to continue a run with the same result: its
position, the weights, the optimizer's state, and the sums of the current epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repan_cli.errors import InputError
from repan_cli.runs.felt import KEYS
from repan_cli.system.text import first_line
from repan_cli.training.optim import PLAIN
from repan_cli.training.progress import POSITION, Totals
from repan_cli.training.run import Training

SUMS = ("totals.loss", "totals.correct", "totals.broken")
"""The names of the sums in `Totals` in a file; the last one is what `Totals.skipped` returns."""


def snapshot(run: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a run apart from the weights that are scored: tensors on the CPU, and plain values."""
    progress, scaler = run.progress, run.scaler
    tensors, memory = _optimizer_state(run)
    plain = {name: getattr(progress, name) for name in POSITION}
    plain |= {"optimizer": memory, "scaler": scaler.state_dict() if scaler.is_enabled() else {}}
    if progress.totals is not None:
        plain |= {"images": progress.totals.images, "first_loss": progress.totals.first_loss}
        tensors |= dict(zip(SUMS, progress.totals.sums, strict=True))
        tensors |= {"totals.noted": progress.totals.noted}
    tensors |= {f"best.{name}": value for name, value in (progress.best_weights or {}).items()}
    if run.ema:
        tensors |= {f"model.{name}": value for name, value in run.model.state_dict().items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, plain


def _optimizer_state(run: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state for each parameter and group: tensors by name, and plain values."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, memory in run.optimizer.state.items():
        name = names[id(parameter)]
        tensors |= {f"optimizer.{key}.{name}": value for key, value in memory.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in memory.items() if isinstance(value, PLAIN)}
        plain |= {name: rest} if rest else {}
    for number, group in enumerate(run.optimizer.param_groups):  # some optimizers count their steps here
        kept = {key: value for key, value in group.items() if isinstance(value, Tensor) and key != "lr"}
        tensors |= {f"group.{number}.{key}": value for key, value in kept.items()}
    groups = [
        {key: value for key, value in group.items() if isinstance(value, PLAIN) and key != "lr"}  # from the position
        for group in run.optimizer.param_groups
    ]
    return tensors, {"parameters": plain, "groups": groups}


LATER = {"since_best": 0}
"""The parts of the position that states of earlier versions lack."""


def restore(run: Training, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put a run whose scored network has its weights already into a state that `snapshot` returned.

    Raises InputError if the state does not belong to this network and optimizer.
    """
    try:
        for name in POSITION:
            setattr(run.progress, name, {**LATER, **plain}[name])
        _restore_optimizer(run, tensors, plain["optimizer"])
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(plain["scaler"])
        if "images" in plain:
            sums = torch.stack([tensors[name] for name in SUMS]).to(run.runtime.device)
            unknown = torch.full((len(KEYS), 2), math.nan)  # missing in files of older versions
            noted = tensors.get("totals.noted", unknown).to(run.runtime.device)
            run.progress.totals = Totals(sums, noted, plain["images"], plain["first_loss"])
            if run.runtime.rank:  # rank 0 holds the sums of all ranks
                run.progress.totals = Totals.zeros(run.runtime.device)
        run.progress.best_weights = _under("best.", tensors, run.runtime.device) or None
        if run.ema:
            run.model.load_state_dict(_under("model.", tensors, run.runtime.device))
    except (LookupError, RuntimeError, ValueError) as error:
        line = first_line(error)
        raise InputError(f"the saved state is not that of this network and optimizer ({line})") from None


def _under(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v.to(device) for name, v in tensors.items() if name.startswith(prefix)}


def _restore_optimizer(run: Training, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    parameters = dict(run.model.named_parameters())
    run.optimizer.state.clear()
    for full, value in tensors.items():
        kind, _, rest = full.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            run.optimizer.state[parameters[name]][key] = _like(parameters[name], value)
        elif kind == "group":
            number, _, key = rest.partition(".")
            run.optimizer.param_groups[int(number)][key] = value.clone()
    for name, rest in plain["parameters"].items():
        run.optimizer.state[parameters[name]].update(rest)
    for group, saved in zip(run.optimizer.param_groups, plain["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "lr"})  # the position determines it


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return the value in the memory format of its parameter, if it has the same shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device) if value.ndim else value.clone()
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
