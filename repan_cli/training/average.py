"""The average of the weights, taken further with every step in a few operations, which can be part of a recording."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from repan_cli.blocks import rep_blocks


class WeightAverage:
    """A network's weights beside those of their average, whose blocks are attached as the network's are.

    The lists of tensors are made once: to look through a network takes longer than to launch the operations on it.
    All of them only ever change in place.

    Args:
        ema: the average; its decay grows with the steps.
        model: the network.
    """

    def __init__(self, ema: ModelEmaV3, model: nn.Module) -> None:
        self.ema, self.model = ema, model
        rates = {f"{name}.attach_rate".removeprefix(".") for name, _ in rep_blocks(model)}
        self.averages: list[Tensor] = []
        self.values: list[Tensor] = []
        self.copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        tensors = model.state_dict()
        for name, mean in ema.module.state_dict().items():
            if mean.is_floating_point() and name not in rates:
                means, values = self.averages, self.values
            else:  # one launch for each type
                means, values = self.copied.setdefault(mean.dtype, ([], []))
            means.append(mean)
            values.append(tensors[name])

    @property
    def coarse(self) -> bool:
        """Return whether weights have a type too coarse for small changes: timm's average then rounds at random."""
        return any(torch.finfo(each.dtype).bits < 32 for each in self.averages)

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        """Go this share of the way to the weights as they are, a number or, for recorded steps, a scalar tensor."""
        if isinstance(share, Tensor):
            steps = torch._foreach_sub(self.values, self.averages)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(self.averages, steps)
        else:
            torch._foreach_lerp_(self.averages, self.values, share)
        self._copy()

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Follow the network after this many steps, counted from 1; decided on the host, so not in a recorded step."""
        if self.coarse:
            self.ema.update(self.model, step=step)
            self._copy()
        else:
            self.follow(self.share(step))

    def _copy(self) -> None:
        """Copy values that are not averaged: counts, and attach rates."""
        for copies, originals in self.copied.values():
            torch._foreach_copy_(copies, originals)

    def share(self, step: int) -> float:
        """Return the weights' share in the average after this number of steps, counted from 1."""
        return 1.0 - self.ema.get_decay(step)
