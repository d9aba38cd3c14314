"""Average the weights over the steps, in a few operations per step that can be part of a recorded step."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from repan_cli.blocks import rep_blocks


class WeightAverage:
    """A network's weights next to their average. The attach rates of the average are those of the network.

    The lists of tensors are made once, because walking through a network takes longer than launching the operations.
    The tensors only ever change in place.

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
            else:  # one launch per dtype
                means, values = self.copied.setdefault(mean.dtype, ([], []))
            means.append(mean)
            values.append(tensors[name])

    @property
    def coarse(self) -> bool:
        """Return whether a weight's dtype is too coarse for small changes; timm's average then rounds at random."""
        return any(torch.finfo(each.dtype).bits < 32 for each in self.averages)

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        """Move the average toward the present weights by this share, a number or, for recorded steps, a scalar
        tensor.
        """
        if isinstance(share, Tensor):
            steps = torch._foreach_sub(self.values, self.averages)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(self.averages, steps)
        else:
            torch._foreach_lerp_(self.averages, self.values, share)
        self._copy()

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Update the average after this many steps, counted from 1. The host decides, so this cannot be recorded."""
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
        """Return the share of the present weights in the average after this number of steps, counted from 1."""
        return 1.0 - self.ema.get_decay(step)
