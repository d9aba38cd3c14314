"""Cast together the weights that autocast would cast layer by layer: one operation forward and one backward.

Each number is rounded as autocast rounds it, so losses and gradients have the same bits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that use their float32 weights only as autocast would cast them.

    Layers that first compute with their weights, for example to standardize them, are excluded, since they do that in
    float32. Layers that share weights are excluded too.
    """
    users = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    return [
        module
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
        and not module._forward_pre_hooks  # a hook may compute a weight from others
        and all(
            each is None or (each.dtype == torch.float32 and users[id(each)] == 1)
            for each in module._parameters.values()
        )
    ]


@contextlib.contextmanager
def at_once(found: Sequence[nn.Module]) -> Iterator[None]:
    """Give these layers their weights in autocast's dtype within the context."""
    places = [place for place in _places(found) if place.weight.requires_grad]
    if not places:
        yield
        return
    dtype = torch.get_autocast_dtype(places[0].weight.device.type)
    with given(places, _Cast.apply(dtype, *(place.weight for place in places))):
        yield


@contextlib.contextmanager
def given(places: Sequence[Place], weights: Sequence[Tensor]) -> Iterator[None]:
    """Replace weights by others within the context."""
    for place, weight in zip(places, weights, strict=True):
        place.layer._parameters[place.name] = weight  # type: ignore[assignment] # as functional_call does
    try:
        yield
    finally:
        for place in places:
            place.layer._parameters[place.name] = place.weight


class Place(NamedTuple):
    """A layer's weight, by its name in the layer."""

    layer: nn.Module
    name: str
    weight: nn.Parameter


def kept(model: nn.Module, dtype: torch.dtype) -> tuple[list[Place], tuple[Tensor, ...]]:
    """Return the places of weights that are not trained, and those weights cast to a lower precision once."""
    places = _places(layers(model))
    with torch.no_grad():
        return places, _cast([place.weight for place in places], dtype)


def _places(found: Sequence[nn.Module]) -> list[Place]:
    return [
        Place(layer, name, weight)
        for layer in found
        for name, weight in layer._parameters.items()
        if weight is not None
    ]


class _Cast(torch.autograd.Function):
    """Cast tensors to a dtype, and their gradients back."""

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
