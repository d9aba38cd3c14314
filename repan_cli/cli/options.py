"""Convert the options that `commands.options` declares to Typer's form, and back."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from repan_cli import config
from repan_cli.cli import completion
from repan_cli.commands.declaration import Argument, Option, declared
from repan_cli.commands.options import RUN, WHAT
from repan_cli.system.text import at_home


class ReadableCommand(TyperCommand):
    """A command whose flags show no type in `--help`: it would look as if a value followed."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with an empty metavar for flags."""
        return _without_types(super().get_params(ctx))


class ReadableGroup(TyperGroup):
    """The program above its commands, with flags like those of `ReadableCommand`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with an empty metavar for flags."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def signature_of(options: type) -> inspect.Signature:
    """Return the signature of a Typer command that takes the options of a dataclass."""
    parameters = []
    for name, kind, how, default in declared(options):
        many = get_origin(kind) is tuple
        shown: Any = list[get_args(kind)[0]] if many else kind  # type: ignore[misc]
        if many and default is not MISSING:
            shown = shown | None
        given = _argument(how) if isinstance(how, Argument) else _option(how, kind, default)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else None if many else default,
                annotation=Annotated[shown, given],
            )
        )
    return inspect.Signature(parameters)


def filled(options: type, given: dict[str, Any]) -> Any:
    """Return the dataclass of options, filled with the values from Typer."""
    values = {}
    for name, kind, _, _ in declared(options):
        many = get_origin(kind) is tuple
        values[name] = tuple(map(_at_home, given[name] or ())) if many else _at_home(given[name])
    return options(**values)


def _at_home(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(at_home(str(value)))
    return at_home(value) if isinstance(value, str) else value


def _argument(how: Argument) -> Any:
    return typer.Argument(metavar=how.metavar, help=how.help, show_default=False, autocompletion=_offers(how))


def _option(how: Option, kind: Any, default: Any) -> Any:
    text = text_of(how)
    is_written = how.metavar == "FILE" and Path in get_args(kind)
    return typer.Option(
        *how.flags,
        metavar=how.metavar,
        help=text,
        show_default=not (default is None or default == () or how.setting),
        autocompletion=_offers(how),
        rich_help_panel=how.panel,
        parser=_file if is_written else None,
    )


def _file(word: str) -> Path:
    """Return the path of a file. Raises BadParameter for a folder, whose slash at the end a Path loses."""
    if isinstance(word, str) and word.endswith(("/", os.sep)):
        raise typer.BadParameter(f"{word} is a folder: name a file in it")
    return Path(word)


def text_of(how: Option) -> str:
    """Return the help of an option, which is that of its setting unless it has its own."""
    if how.setting is None:
        return how.help
    setting = config.DECLARED[how.setting]
    text = how.help or setting.text
    given = how.panel in (WHAT, RUN)  # recipes set the defaults of the others
    if given and isinstance(setting.default, (int, str)) and setting.default is not False:
        return f"{text.rstrip('.')}; default {setting.default}."
    return text


def _offers(how: Option | Argument) -> Callable[[str], list[str]] | None:
    if how.offers == "words":
        return completion.words
    if how.offers:
        return completion.completes(getattr(completion, how.offers))
    key = how.setting if isinstance(how, Option) else None
    return completion.of_setting(key) if key and key != "model.pretrained" else None
