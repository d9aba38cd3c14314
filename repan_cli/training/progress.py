"""Track the progress of a run: its position in the plan, and the sums over the current epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from repan_cli.errors import DivergedError
from repan_cli.runs.felt import KEYS
from repan_cli.system.ranks import joined, summed


@dataclass
class Totals:
    """Sums over an epoch, on the device; reading them is a host-device sync.

    The three sums are the loss, the correct images, and the updates that were skipped because a loss or a gradient was
    not finite. `noted` (3, 2) holds the loss and the images up to each of the steps that `felt.marks` names, zeros
    until then.
    """

    sums: Tensor
    noted: Tensor
    images: int = 0
    first_loss: float = math.nan

    @classmethod
    def zeros(cls, device: torch.device) -> Totals:
        return cls(torch.zeros(3, device=device), torch.zeros(len(KEYS), 2, device=device))

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
        """Add an update on `images` images."""
        self.sums += sums
        self.images += images

    def note(self, number: int) -> None:
        """Store the loss so far under this mark's number, without a host-device sync."""
        self.noted[number, 0].copy_(self.loss)
        self.noted[number, 1].fill_(self.images)

    def felt(self) -> dict[str, float | None]:
        """Return mean losses over all ranks by the names of `felt.KEYS`; None for a window without a part in this
        epoch.
        """
        end = torch.stack([self.loss, torch.full_like(self.loss, self.images)])
        *heads, tail, whole = summed(torch.stack([*self.noted, end])).tolist()
        sums = [*heads, [total - before for total, before in zip(whole, tail, strict=True)]]
        return {key: loss / images if images > 0 else None for key, (loss, images) in zip(KEYS, sums, strict=True)}

    def mean_loss(self) -> float:
        """Return the mean loss over all ranks. Raises DivergedError if it is not finite, or an update was skipped."""
        loss, skipped, images = summed(
            torch.stack([self.loss, self.skipped, torch.full_like(self.loss, self.images)])
        ).tolist()
        _check(loss, skipped)
        return float(loss / images)

    def check(self) -> None:
        """Raise DivergedError if the loss is not finite or an update was skipped, without asking other ranks."""
        loss, _, skipped = self.sums.tolist()
        _check(loss, skipped)

    def top1(self) -> float:
        """Return the training top-1 in percent."""
        correct, images = summed(torch.stack([self.correct, torch.full_like(self.correct, self.images)])).tolist()
        return 100 * correct / images

    def pool(self, rank: int) -> None:
        """Move the sums of all ranks to rank 0, which saves them, and set those of the others to zero."""
        if not joined():
            return
        loss, correct, images = summed(torch.stack([*self.sums[:2], torch.full_like(self.loss, self.images)])) * (
            rank == 0
        )
        self.sums = torch.stack([loss, correct, self.skipped])
        self.noted = summed(self.noted) * (rank == 0)
        self.images = int(images.item())


def _check(loss: float, skipped: float) -> None:
    if skipped or not math.isfinite(loss):
        raise DivergedError(
            "the loss or a gradient is no longer finite; lower optim.lr (--lr), or set a smaller optim.clip"
        )


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        phase: the number of the phase in the plan.
        begun: whether the phase has begun.
        epoch: the number of its finished epochs.
        step: the number of steps done in the next epoch.
        totals: the sums over those steps.
        seconds: seconds spent in the phase.
        best_top1, best_of_phase: the best validation top-1 of the run and of the phase.
        since_best: the number of epochs since the run's best.
        best_weights: the weights that the next phase starts from, if they are not the last ones.
        whole: false while a restart is under way.
    """

    phase: int = 0
    begun: bool = False
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_top1: float = -math.inf
    best_of_phase: float = -math.inf
    since_best: int = 0
    totals: Totals | None = None
    best_weights: dict[str, Tensor] | None = None
    whole: bool = True

    def next_phase(self) -> None:
        self.phase += 1
        self.begun, self.epoch, self.seconds = False, 0, 0.0
        self.best_of_phase, self.best_weights = -math.inf, None


POSITION = tuple(field.name for field in fields(Progress) if field.name not in ("totals", "best_weights", "whole"))
