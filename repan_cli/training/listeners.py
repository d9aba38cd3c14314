"""Pass the events of this thread's runs to the user's own functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from repan_cli.training.events import Event

Listener = Callable[[Event], None]
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send every event to a function within the context. An exception in it ends the run, whose last save is kept."""
    before = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(before)


def announce(event: Event) -> None:
    """Send an event to all listeners."""
    for listener in _LISTENERS.get():
        listener(event)
