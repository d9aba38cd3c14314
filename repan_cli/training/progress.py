"""How far a run has come: its position in the plan and the sums over the epoch that is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from repan_cli.errors import DivergedError
from repan_cli.system.ranks import joined, summed


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
    def skipped(self) -> Tensor:
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
        if self.skipped.item() or not math.isfinite(self.loss.item()):
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
        self.sums = torch.stack([loss, correct, self.skipped])
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
