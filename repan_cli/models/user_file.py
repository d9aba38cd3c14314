"""Networks from a person's own Python file, named `file.py:function`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from repan_cli.config.names import names_a_file, no_network_file
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import first_line

__all__ = ["build", "names_a_file"]


def build(name: str, *, num_classes: int, in_chans: int) -> nn.Module:
    """The network that `file.py:function` returns.

    The function (or class) is called with those of `num_classes` and `in_chans` that it takes. Raises InputError, in a
    line, when the file does not import, has no such function, or returns no network.
    """
    path, _, function = name.rpartition(":")
    module = _imported(Path(path))
    make = getattr(module, function, None)
    if not callable(make):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{path} has no function '{function}'{did_you_mean(function, own)}")
    try:
        network = make(**_accepted(make, num_classes=num_classes, in_chans=in_chans))
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} failed: {_describe(error, path)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise no_network_file(path)
    spec = importlib.util.spec_from_file_location(f"repan_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "every name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look it up
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # so that it finds the files beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot import {path}: {_describe(error, str(path))}") from error
    return module


def _accepted(make: Callable[..., Any], **offered: int) -> dict[str, int]:
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}


def _describe(error: BaseException, path: str) -> str:
    """Tell an error in a line, with the last line of the file that it passed through."""
    line, trace = None, error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    what = f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
    return what + (f" (line {line})" if line else "")
