"""Import PyTorch's companions without modules that repan seldom uses.

timm imports wandb for one logging function. torchvision and timm import torch._dynamo, the compiler, for one check and
one decorator. Together these take longer than PyTorch itself. In the process of a command, which runs no other code,
their import is deferred until they are needed.

Garbage collection during imports takes a fifth of the time: the collector visits everything imported so far, again and
again, although modules stay until the process ends. So it is paused.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

COMPILER = "torch._dynamo"
LOGGERS = ("wandb",)
"""Packages that timm logs to if they are installed. Trackers import them themselves, later."""


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Defer the compiler, hide the packages of loggers, and pause garbage collection during imports.

    The collector never visits the imported objects again. If the compiler is loaded already, nothing is deferred. Any
    use of it besides the check and the decorator loads it at once.
    """
    hidden = [name for name in LOGGERS if name not in sys.modules]
    put_off = {} if COMPILER in sys.modules else _put_off()
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type] # None: an import of it is an ImportError
    sys.modules |= put_off
    first, collects = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:  # later there is more than modules
            gc.freeze()
        if collects:
            gc.enable()
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
        _take_away(put_off)


def _put_off() -> dict[str, ModuleType]:
    """Return the stand-ins for the compiler, and for the part of it that torchvision queries."""
    compiler, utils = _PutOff(COMPILER), _PutOff(f"{COMPILER}.utils")
    stand_ins: dict[str, ModuleType] = {compiler.__name__: compiler, utils.__name__: utils}
    compiler.__path__ = []
    compiler.load = utils.load = lambda: _take_away(stand_ins)
    compiler.disable = _disable  # type: ignore[attr-defined]
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    return stand_ins


def _take_away(stand_ins: dict[str, ModuleType]) -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


class _PutOff(ModuleType):
    """Stands for a module until an attribute is requested that it does not have."""

    load: Callable[[], None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self.load()
        return getattr(importlib.import_module(self.__name__), name)


def _disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
    """Decorate as `torch.compiler.disable` does, but load the compiler only at the first call."""
    if function is not None and not isinstance(function, FunctionType):  # a class or a module is changed at once
        sys.modules[COMPILER].load()
        return importlib.import_module(COMPILER).disable(function, recursive)
    return sys.modules["torch"]._disable_dynamo(function, recursive)


def _is_compile_supported(device_type: str) -> Any:
    """Ask the compiler itself when torchvision queries it."""
    return importlib.import_module(f"{COMPILER}.utils").is_compile_supported(device_type)
