"""Weights that autocast would cast one layer at a time, cast together: one operation forward and one back.

Each number is rounded as autocast rounds it, so that losses and gradients have the same bits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that do nothing with their float32 weights but what autocast would cast them for.

    Those that compute with them first, such as by standardising them, go on doing that in float32, as do layers that
    share their weights with others.
    """
    users = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    return [
        module
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
        and not module._forward_pre_hooks  # which may make a weight of others
        and all(
            each is None or (each.dtype == torch.float32 and users[id(each)] == 1)
            for each in module._parameters.values()
        )
    ]


@contextlib.contextmanager
def at_once(found: Sequence[nn.Module]) -> Iterator[None]:
    """Give such layers their weights in the type of the autocast that is on, meanwhile."""
    places = [
        (module, name, weight)
        for module in found
        for name, weight in module._parameters.items()
        if weight is not None and weight.requires_grad
    ]
    if not places:
        yield
        return
    kind = places[0][2].device.type
    cast = _Cast.apply(torch.get_autocast_dtype(kind), *(weight for *_, weight in places))
    for (module, name, _), lower in zip(places, cast, strict=True):
        module._parameters[name] = lower
    try:
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


class _Cast(torch.autograd.Function):
    """Casts tensors to a type, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _cast(given, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        back = iter(_cast(there, torch.float32))
        return None, *(None if grad is None else next(back) for grad in grads)


def _cast(given: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    places = tuple(torch.empty_like(each, dtype=dtype) for each in given)
    if places:
        torch._foreach_copy_(places, list(given))
    return places
