"""Send notices from folders that do not print: warnings through the standard library's logging, and current activities.

`display.console.show_notices` prints them. If nobody calls it, Python prints warnings on stderr.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from repan_cli.system.launcher import own_rank

LOGGER = logging.getLogger("repan_cli")


def warn(text: str) -> None:
    """Send a warning; of several ranks only the first sends it."""
    if own_rank() == 0:
        LOGGER.warning("%s", text)


_DOING: list[str] = []
_WATCHERS: list[Callable[[str | None], None]] = []
_SAID: set[str] = set()


def warn_once(text: str) -> None:
    """Send a warning that this process has not sent yet."""
    if text not in _SAID:
        _SAID.add(text)
        warn(text)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Announce a long, silent activity to listeners within the context."""
    _DOING.append(what)
    _tell_watchers()
    try:
        yield
    finally:
        _DOING.pop()
        _tell_watchers()


@contextlib.contextmanager
def watched_by(watcher: Callable[[str | None], None]) -> Iterator[None]:
    """Call a function with the current activity, and with None at its end; of several listeners the latest is
    called.
    """
    if _WATCHERS:
        _WATCHERS[-1](None)
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        watcher(None)
        _WATCHERS.remove(watcher)
        _tell_watchers()


def _tell_watchers() -> None:
    if _WATCHERS and own_rank() == 0:
        _WATCHERS[-1](_DOING[-1] if _DOING else None)
