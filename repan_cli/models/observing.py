"""Observe one forward pass: which modules add images, and which read the outputs and weights of convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repan_cli.models.norms import is_norm
from repan_cli.models.probe import Sightings, watch

SIDES = 4
"""Dimensions of a batch of images."""

ADDS = ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "sum", "mean")
LINEAR = ("conv2d", "batch_norm", "avg_pool2d", "pad", "contiguous")
"""Functions whose results can be summed as branches."""

MARK = "_repan_from"


@dataclass
class Observed:
    """The findings of one pass, by the names of modules.

    Attributes:
        adders: modules that add images in their own forward; True if all terms come from linear layers.
        readers: the number of calls that read the output of a convolution.
        uses: the number of reads of a layer's tensors from outside of the layer.
        arguments: the number of arguments of a module's calls, -1 if it differs or one was given by name.
    """

    adders: dict[str, bool] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)
    uses: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    arguments: dict[str, int] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    def __init__(self, found: Observed, model: nn.Module) -> None:
        super().__init__()
        self.found = found
        self.stack: list[str] = []
        self.owners = {
            id(tensor): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) or is_norm(module)
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        marks = [vars(each).get(MARK) if hasattr(each, "__dict__") else None for each in given]
        result = function(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple)):
            return result
        self._count(given, marks, moved=not any(result is each for each in given))
        name = getattr(function, "__name__", "")
        if isinstance(result, Tensor) and result.ndim == SIDES:
            images = [mark for each, mark in zip(given, marks, strict=True) if each.ndim >= SIDES]
            if name in ADDS and images:
                linear = all(mark is not None for mark in images) and (len(images) > 1 or name in ("sum", "mean"))
                where = self.stack[-1] if self.stack else ""
                self.found.adders[where] = self.found.adders.get(where, False) or linear
            if name in LINEAR or (name in ADDS and images and all(mark is not None for mark in images)):
                vars(result)[MARK] = ("", 0)
        return result

    def _count(self, given: list[Tensor], marks: list[Any], *, moved: bool) -> None:
        """Count the reads of one call; a module that returns its input reads nothing."""
        for each, mark in zip(given, marks, strict=True):
            if moved and mark is not None and mark[0] and mark[1] == each._version:
                self.found.readers[mark[0]] += 1
            owner = self.owners.get(id(each))
            if owner is not None and owner != (self.stack[-1] if self.stack else ""):
                self.found.uses[owner] += 1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> tuple[Observed, Sightings]:
    """Watch one pass of a network in eval mode."""
    found = Observed()
    mode = _Watch(found, model)
    with _hooked(model, mode), mode:
        return found, watch(model, images, is_norm=is_norm, trains=False)


@contextmanager
def _hooked(model: nn.Module, mode: _Watch) -> Iterator[None]:
    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mode.stack.append(name)
            mode.found.calls[name] += 1
            same = mode.found.arguments.setdefault(name, len(args)) == len(args)
            mode.found.arguments[name] = len(args) if same and not kwargs else -1

        return enter

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while mode.stack and mode.stack.pop() != name:
                pass
            if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
                vars(output)[MARK] = (name, output._version)

        return leave

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
