"""Translate errors for callers from Python: `model='net'` in place of the command line's `--model net`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from repan_cli.errors import InputError

OPTION = re.compile(
    r"""repan\ (?!\w+:)[a-z]+\ [^;']*                                   # a whole command, which is left
    | (?<![\w-])(?P<option>--[a-z][a-z-]*|-[a-z])(?![\w-])
      (?:[ ](?P<value>'[^']*'|[^\s;,()']*[^\s;,():.'?]))?""",
    re.VERBOSE,
)
PROSE = frozenset(
    (
        *("a", "alone", "and", "are", "at", "be", "belong", "belongs", "can", "cannot", "for", "gives", "has", "have"),
        *(
            "here",
            "in",
            "instead",
            "is",
            "may",
            "means",
            "must",
            "names",
            "of",
            "on",
            "or",
            "says",
            "takes",
            "than",
            "that",
            "to",
        ),
        *("was", "where", "which", "with"),
    )
)
"""Words that follow an option in a sentence and are not its value."""


def in_python(text: str, names: Mapping[str, str], flags: frozenset[str] = frozenset()) -> str:
    """Return a message with the arguments of a function in place of the options of a command.

    Args:
        text: a message for the command line.
        names: the arguments by the options, such as `--batch-size`.
        flags: the options without a value.
    """

    def named(match: re.Match[str]) -> str:
        option, value = match["option"], match["value"]
        if option not in names:
            return match[0]
        rest = "" if value is None else f" {value}"
        if option in flags:
            return f"{names[option]}=True{rest}"
        if value is None or value in PROSE:
            return f"{names[option]}=...{rest}"
        bare = value.strip("'")
        is_placeholder = re.fullmatch(r"[A-Z][A-Za-z.:]*", value) and value.upper() == value.replace(".py", ".PY")
        return f"{names[option]}={bare if is_placeholder else repr(bare)}"

    return OPTION.sub(named, text)


@contextlib.contextmanager
def told_in_python(names: Mapping[str, str], flags: frozenset[str] = frozenset()) -> Iterator[None]:
    """Make input errors within the context name a function's arguments."""
    try:
        yield
    except InputError as error:
        error.args = (in_python(str(error), names, flags),)
        raise
