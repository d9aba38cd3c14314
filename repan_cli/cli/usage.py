"""Explain command lines that cannot be understood, each fault in one line that says what to type instead."""

from __future__ import annotations

import re
import sys
from typing import Any

from repan_cli.cli.suggestions import ADVICE, argument_of, option_of, unknown_command, unknown_options
from repan_cli.cli.words import as_typed
from repan_cli.registry import did_you_mean

EXTRA = re.compile(r"unexpected extra argument\(?s?\)? \(([^ ]+)\)")
"""Click's message of a single argument too many."""


def usage_errors(error: Any, options: dict[str, type]) -> list[str]:
    """Return the lines for a usage error of Click; `options` holds the dataclass of options of each command."""
    message = error.format_message().partition(" (Possible options")[0].replace("\n", " ").strip().rstrip(".?")
    lines = _unknown(error, options)
    if message and not lines:  # without arguments the help was already shown
        message = (message[0].lower() + message[1:]).replace(". Did you mean", "; did you mean")
        lines = [message + _mend(error, message, options)]
    return lines


def _unknown(error: Any, options: dict[str, type]) -> list[str]:
    """Return a line for each option, or one for the command, that does not exist."""
    words = as_typed(sys.argv[1:])
    command = next((word for word in words if not word.startswith("-")), "")
    kind = type(error).__name__
    if kind == "NoSuchOption" and words[0] == command:
        return unknown_options(command, words[1:], options)
    if kind == "NoSuchOption" and command in options:
        return [f"no such option: {error.option_name}: options follow the command, as in 'repan {command} OPTIONS'"]
    if kind == "NoSuchOption" and (told := ADVICE.get(error.option_name.lstrip("-").replace("-", "_"))):
        return [f"no such option: {error.option_name}; {told}"]
    if kind == "NoSuchCommand" or error.format_message().startswith("No such command"):
        after = words[words.index(command) + 1 :]
        return [f"no such command '{command}'{unknown_command(command, after, options)}"]
    return []


def _mend(error: Any, message: str, options: dict[str, type]) -> str:
    command = next((word for word in sys.argv[1:] if word in options), None)
    told = getattr(getattr(error, "param", None), "help", None)
    if message.startswith("missing argument") and command and told:
        told = told.strip().partition("  [")[0].rstrip(".")
        return f": {told[0].lower()}{told[1:]}; see 'repan {command} --help'"
    extra = EXTRA.search(message)
    if extra and command:
        return option_of(extra[1], command, options[command])
    if "requires an argument" in message and command:
        return argument_of(error.option_name, options[command])
    hint = did_you_mean(getattr(error, "option_name", None) or "", getattr(error, "possibilities", None) or ())
    if hint or "did you mean" in message:
        return hint or "?"
    return f"; see 'repan {command} --help'" if command else "; see 'repan --help'"
