"""Functions of a person's own that hear the events of the runs of this thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from repan_cli.training.events import Event

Listener = Callable[[Event], None]
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a function hear every event meanwhile. What it raises ends the run, whose last save is kept."""
    before = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(before)


def announce(event: Event) -> None:
    """Tell an event to all who listen."""
    for listener in _LISTENERS.get():
        listener(event)
