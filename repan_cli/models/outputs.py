"""What a network returns: one tensor, or dictionaries, lists and tuples of tensors, compared leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Leaves = dict[str, Tensor]
"""The floating tensors of an output by their place in it, such as `out` or `0.boxes`; '' is an output that is one."""


def leaves(output: Any) -> Leaves:
    """Return the floating tensors in what a network returns."""
    return dict(_leaves(output, ()))


def _leaves(output: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield ".".join(path), output
    elif isinstance(output, Mapping):
        for key, part in output.items():
            yield from _leaves(part, (*path, str(key)))
    elif isinstance(output, (list, tuple)):
        for key, part in enumerate(output):
            yield from _leaves(part, (*path, str(key)))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _leaves(getattr(output, field.name), (*path, field.name))


def difference(found: Leaves, expected: Leaves) -> float:
    """Return the largest relative difference of a leaf; infinite where leaves, shapes or finite values differ."""
    return max((error for _, error in differences(found, expected)), default=0.0)


def differences(found: Leaves, expected: Leaves) -> Iterator[tuple[str, float]]:
    """Yield the place of each leaf with its relative difference."""
    for name in [*expected, *(each for each in found if each not in expected)]:
        a, b = found.get(name), expected.get(name)
        yield name, float("inf") if a is None or b is None or a.shape != b.shape else relative_error(a, b)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value expected; infinite for nan."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = ((found - expected).abs().max() / scale).item()
    return error if error == error else float("inf")
