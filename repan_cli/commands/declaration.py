"""Declare options and arguments of commands; `commands.options` consists of these declarations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Option:
    """The declaration of an option: its names and its help.

    `offers` names the function of `cli.completion` that completes its value. `setting` is the key of the setting for
    which the option is a shortcut; help and completion are the setting's unless they are given here.
    """

    flags: tuple[str, ...] = ()
    help: str = ""
    metavar: str | None = None
    offers: str | None = None
    setting: str | None = None
    panel: str | None = None


@dataclass(frozen=True)
class Argument:
    """The declaration of an argument: its name and its help."""

    metavar: str
    help: str
    offers: str | None = None


def declared(options: type) -> Iterator[tuple[str, Any, Option | Argument, Any]]:
    """Yield name, type, declaration and default of each field of a dataclass of options, in the order of the help."""
    hints = get_type_hints(options, include_extras=True)
    for entry in fields(options):
        kind, how = get_args(hints[entry.name])
        yield entry.name, kind, how, entry.default


def shortcuts(options: type) -> dict[str, str]:
    """Return the settings that options are shortcuts for, by the name of the option."""
    named = ((name, how) for name, _, how, _ in declared(options) if isinstance(how, Option))
    return {name: how.setting for name, how in named if how.setting is not None}
