"""Normalize arguments that sweep agents write: `--optim.lr=0.1`, `--batch_size=64`, `--epochs 3`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from repan_cli.commands.declaration import Option, declared
from repan_cli.commands.options import CycleOptions, StudyOptions, TrainOptions
from repan_cli.config.settings import OVERLAY, SCHEMA

TRAINING = {"train": TrainOptions, "distill": TrainOptions, "cycle": CycleOptions, "study": StudyOptions}
"""The commands that take settings."""

SWITCHES = {"true": True, "false": False}


def as_typed(words: list[str]) -> list[str]:
    """Return a command line as a user would type it.

    `--KEY=VALUE` and `--KEY VALUE` of a setting become `KEY=VALUE`. Underscores in the name of an option become
    hyphens. A switch with the value true or false, as programs write it, is given or omitted.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in TRAINING:
        return words
    return [*_translated(words, TRAINING[command])]


def _translated(words: Iterable[str], options: type) -> Iterator[str]:
    flags = {flag: kind for _, kind, how, _ in declared(options) if isinstance(how, Option) for flag in how.flags}
    named = {f"--{name.replace('_', '-')}" for name, *_ in declared(options)}
    switches = {f"--{name.replace('_', '-')}" for name, kind, *_ in declared(options) if kind is bool}
    switches |= {flag for flag, kind in flags.items() if kind is bool}
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word == "--":
            yield word
            yield from rest
            return
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            yield word
        elif _is_setting(name.removeprefix("--")):
            yield f"{name.removeprefix('--')}={value if equals or not rest else rest.popleft()}"
        else:
            hyphened = name.replace("_", "-")
            name = hyphened if hyphened in flags or hyphened in named else name
            if name in switches and not equals and rest and rest[0].lower() in SWITCHES:
                value = rest.popleft()
            if name in switches and value.lower() in SWITCHES:
                if SWITCHES[value.lower()]:
                    yield name
            else:
                yield f"{name}{equals}{value}"


def _is_setting(key: str) -> bool:
    """Return whether a word is the key of a setting; one with a dot that is unknown is refused as such later."""
    return "." in key or (key in SCHEMA and key != "epochs") or key in OVERLAY
