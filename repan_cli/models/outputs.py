"""Compare the outputs of networks leaf by leaf: one tensor, or dictionaries, lists and tuples of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Leaves = dict[str, Tensor]
"""The floating-point tensors of an output by their place in it, such as `out` or `0.boxes`; '' if the output is a
tensor.
"""


def leaves(output: Any) -> Leaves:
    """Return the floating-point tensors in a network's output; complex ones as pairs of real numbers."""
    return {name: value for name, value in _named(output).items() if value.is_floating_point()}


def all_leaves(output: Any) -> Leaves:
    """Return all tensors in a network's output; integers, such as classes, as float64."""
    named = _named(output)
    return {name: value if value.is_floating_point() else value.double() for name, value in named.items()}


def _named(output: Any) -> Leaves:
    """Return all tensors by their place.

    If two places would be written alike, such as `a.b`, the second gets a number.
    """
    found: Leaves = {}
    for name, value in _leaves(output, ()):
        number = 2
        unique = name
        while unique in found:
            unique, number = f"{name}_{number}", number + 1
        found[unique] = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return found


def _leaves(output: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
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


DEPTH = 2
"""The number of module levels whose outputs are compared if the network's own outputs say nothing."""


def inner_modules(model: nn.Module) -> set[str]:
    """Return the names of the larger parts of a network: those with parameters, and with parts of their own."""
    near = [(name, module) for name, module in model.named_modules() if name and name.count(".") < DEPTH]
    return {
        name for name, module in near if any(True for _ in module.children()) and any(True for _ in module.parameters())
    }


def inner_outputs(model: nn.Module, images: Tensor, names: Collection[str]) -> Leaves:
    """Return the outputs of some modules in one pass, by name, for modules that are called once."""
    found: dict[str, list[Leaves]] = {}
    modules = [(name, module) for name, module in model.named_modules() if name in names]
    hooks = [
        module.register_forward_hook(
            lambda _, args, output, name=name: found.setdefault(name, []).append(_copied(leaves(output)))
        )
        for name, module in modules
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: calls[0] for name, calls in found.items() if len(calls) == 1}
    return {f"{name}.{leaf}".rstrip("."): value for name, part in once.items() for leaf, value in part.items()}


def _copied(found: Leaves) -> Leaves:
    return {name: value.clone() for name, value in found.items()}  # later layers may change it in place


def difference(found: Leaves, expected: Leaves) -> float:
    """Return the largest relative difference of any leaf; infinite if leaves, shapes or non-finite values differ."""
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
