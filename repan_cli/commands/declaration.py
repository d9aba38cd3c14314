"""Declare options and arguments of commands; `commands.options` consists of these declarations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from repan_cli import config
from repan_cli.errors import InputError
from repan_cli.system.text import on_one_line


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


def given_settings(options: Any) -> dict[str, Any]:
    """Return the layer of settings that a command line gives, as KEY=VALUE or by options that are shortcuts for them.

    Raises InputError for a setting that is given twice, and, with one line for each, for values that options refuse.
    """
    given, problems = config.parse_assignments(list(options.settings)), []
    for name, _, how, _ in declared(type(options)):
        value = getattr(options, name)
        if not isinstance(how, Option) or how.setting is None or value in (None, False):
            continue
        flag = how.flags[0]
        if how.setting in given:
            raise InputError(f"{flag} and {how.setting}= are the same setting: give one")
        try:
            config.DECLARED[how.setting].parse(str(value))
        except ValueError as error:
            problems.append(f"{flag}: {error}")
        given[how.setting] = str(value)
    if problems:
        raise InputError("\n".join(map(on_one_line, problems)))
    return given
