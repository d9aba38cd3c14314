"""Look up things by name, with "did you mean" for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from repan_cli.errors import InputError

T = TypeVar("T")


def closest(name: str, choices: Iterable[str], *, likeness: float = 0.6) -> list[str]:
    """Return up to three of `choices` that are spelled like `name`, the closest first."""
    choices = list(choices)
    same = [choice for choice in choices if choice.lower() == name.lower()]
    return same or difflib.get_close_matches(name.lower(), choices, n=3, cutoff=likeness)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error message: the closest of `choices`, or nothing when none is close."""
    close = closest(name, choices)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class Registry(Generic[T]):
    """A table of named things of one kind, filled by a decorator.

    An unknown name raises `InputError`, with the closest names and the command that lists all.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def enter(thing: T) -> T:
            assert name not in self._entries, f"{self.kind} {name} is registered twice"
            self._entries[name] = thing
            return thing

        return enter

    def put(self, name: str, thing: T) -> None:
        """Enter a thing under a name, replacing the thing that had it."""
        self._entries[name] = thing

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            hint = did_you_mean(name, self._entries) or f"; there are {', '.join(self._entries)}"
            raise InputError(f"unknown {self.kind} '{name}'{hint}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
