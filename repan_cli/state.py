"""The state of a run beyond its weights: tensors by name and plain values that `last.pt` carries, and the way back.

Everything random is keyed by position, so that position, weights, the optimizer's memory and the sums of the epoch that
is under way are all a run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repan_cli.errors import DivergedError, InputError
from repan_cli.runtime import joined, summed

if TYPE_CHECKING:
    from repan_cli.engine import Training

PLAIN = (int, float, bool, str, type(None))


@dataclass
class Totals:
    """Sums over an epoch, on the device: reading them is a host-device sync. They are, (3,), the loss, hits, and
    updates that were left out because a loss or a gradient was not finite.
    """

    sums: Tensor
    images: int = 0
    first_loss: float = math.nan

    @classmethod
    def zeros(cls, device: torch.device) -> Totals:
        return cls(torch.zeros(3, device=device))

    @property
    def loss(self) -> Tensor:
        return self.sums[0]

    @property
    def correct(self) -> Tensor:
        return self.sums[1]

    @property
    def broken(self) -> Tensor:
        return self.sums[2]

    def add(self, sums: Tensor, images: int) -> None:
        """An update on so many images."""
        self.sums += sums
        self.images += images

    def mean_loss(self) -> float:
        """Over all ranks. Raises DivergedError when it is not finite, or an update was left out."""
        loss, images = summed(torch.stack([self.loss, torch.full_like(self.loss, self.images)])).tolist()
        self.check()
        return loss / images

    def check(self) -> None:
        """Raises DivergedError when the loss is not finite, or an update was left out; asks no other rank."""
        if self.broken.item() or not math.isfinite(self.loss.item()):
            raise DivergedError("the loss or a gradient is no longer finite; lower optim.lr, or set optim.clip")

    def top1(self) -> float:
        """In percent."""
        correct, images = summed(torch.stack([self.correct, torch.full_like(self.correct, self.images)])).tolist()
        return 100 * correct / images

    def pool(self, rank: int) -> None:
        """Let rank 0 hold the sums of all ranks, and the others nothing: what rank 0 saves is then everything."""
        if not joined():
            return
        loss, correct, images = summed(torch.stack([*self.sums[:2], torch.full_like(self.loss, self.images)])) * (
            rank == 0
        )
        self.sums = torch.stack([loss, correct, self.broken])
        self.images = int(images.item())


@dataclass
class Progress:
    """How far a run has come: `phase` of its plan, whether that has `begun`, its `epoch`s and the `step`s of the next
    one that are done, the sums over those steps, seconds spent in the phase, the best so far. It is not `whole` while a
    restart is under way.
    """

    phase: int = 0
    begun: bool = False
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_top1: float = -math.inf
    best_of_phase: float = -math.inf
    totals: Totals | None = None
    best_weights: dict[str, Tensor] | None = None
    whole: bool = True

    def next_phase(self) -> None:
        self.phase += 1
        self.begun, self.epoch, self.seconds = False, 0, 0.0
        self.best_of_phase, self.best_weights = -math.inf, None


POSITION = tuple(field.name for field in fields(Progress) if field.name not in ("totals", "best_weights", "whole"))


def snapshot(run: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a run beside the weights that are scored: tensors on the CPU, and plain values."""
    progress, scaler = run.progress, run.scaler
    tensors, memory = _optimizer_state(run)
    plain = {name: getattr(progress, name) for name in POSITION}
    plain |= {"optimizer": memory, "scaler": scaler.state_dict() if scaler.is_enabled() else {}}
    if progress.totals is not None:
        plain |= {"images": progress.totals.images, "first_loss": progress.totals.first_loss}
        tensors |= {f"totals.{name}": getattr(progress.totals, name) for name in ("loss", "correct", "broken")}
    tensors |= {f"best.{name}": value for name, value in (progress.best_weights or {}).items()}
    if run.ema:
        tensors |= {f"model.{name}": value for name, value in run.model.state_dict().items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, plain


def _optimizer_state(run: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer remembers of each parameter, and what it keeps in its groups."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    tensors, plain = {}, {}
    for parameter, memory in run.optimizer.state.items():
        name = names[id(parameter)]
        tensors |= {f"optimizer.{key}.{name}": value for key, value in memory.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in memory.items() if isinstance(value, PLAIN)}
        plain |= {name: rest} if rest else {}
    groups = [
        {key: value for key, value in group.items() if isinstance(value, PLAIN)} for group in run.optimizer.param_groups
    ]
    return tensors, {"parameters": plain, "groups": groups}


def restore(run: Training, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put a run, whose scored network has its weights already, into a state that `snapshot` gave.

    Raises InputError when the state is not of this network and optimizer.
    """
    try:
        for name in POSITION:
            setattr(run.progress, name, plain[name])
        _restore_optimizer(run, tensors, plain["optimizer"])
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(plain["scaler"])
        if "images" in plain:
            sums = torch.stack([tensors[f"totals.{name}"] for name in ("loss", "correct", "broken")])
            run.progress.totals = Totals(sums.to(run.runtime.device), plain["images"], plain["first_loss"])
            if run.runtime.rank:  # rank 0 holds the sums of all
                run.progress.totals = Totals.zeros(run.runtime.device)
        run.progress.best_weights = _under("best.", tensors, run.runtime.device) or None
        if run.ema:
            run.model.load_state_dict(_under("model.", tensors, run.runtime.device))
    except (KeyError, RuntimeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
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
    for name, rest in plain["parameters"].items():
        run.optimizer.state[parameters[name]].update(rest)
    for group, saved in zip(run.optimizer.param_groups, plain["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "lr"})  # which the position sets


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """In the memory format of its parameter, where it has its shape."""
    if value.shape != parameter.shape:
        return value.to(parameter.device) if value.ndim else value.clone()
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
