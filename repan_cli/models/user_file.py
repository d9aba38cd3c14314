"""Networks from a user's Python file, named `file.py:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from repan_cli.errors import InputError
from repan_cli.system.user_code import described, function_of, names_a_file

__all__ = ["build", "names_a_file"]


def build(name: str, *, num_classes: int, in_chans: int) -> nn.Module:
    """Return the network that `file.py:function` returns.

    The function (or class) is called with `num_classes` and `in_chans`, if it takes them. Raises InputError, in one
    line, if the file cannot be imported, has no such function, or the function returns no network.
    """
    make = function_of(name, what="a network")
    try:
        network = make(**_accepted(make, num_classes=num_classes, in_chans=in_chans))
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} failed: {described(error, name.rpartition(':')[0])}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _accepted(make: Callable[..., Any], **offered: int) -> dict[str, int]:
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}
