"""Show the current activity of a silent command: redrawn on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import threading
import time

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from repan_cli.system.text import duration, shown

PATIENCE, REPEAT = 10, 60
"""Seconds until a line is printed if nothing can be redrawn, and seconds between two lines."""

AT_ONCE = 0.3
"""Seconds that an activity must take before a terminal shows it."""


class Activity:
    """Shows one activity at a time. Call it with the current activity, or with None."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.redraws = console.is_terminal and not console.is_dumb_terminal
        self._lock = threading.Lock()
        self._what: str | None = None
        self._began = 0.0
        self._live: Live | None = None
        self._over = threading.Event()

    def __call__(self, what: str | None) -> None:
        with self._lock:
            if what == self._what:
                return
            self._stop()
            if what is not None:
                self._what, self._began, self._over = what, time.monotonic(), threading.Event()
                threading.Thread(target=self._watch, args=(self._over, what), daemon=True).start()

    def _stop(self) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._what = None

    def _watch(self, over: threading.Event, what: str) -> None:
        """Show the activity once it takes long."""
        if over.wait(AT_ONCE if self.redraws else PATIENCE):
            return
        if self.redraws:
            with self._lock:
                if not over.is_set():
                    self._live = Live(self, console=self.console, refresh_per_second=2, transient=True)
                    self._live.start(refresh=True)
            return
        while True:
            self.console.print(self._line(what), soft_wrap=True)
            if over.wait(REPEAT):
                return

    def _line(self, what: str) -> Text:
        return Text(f"{shown(what)} ... {duration(time.monotonic() - self._began)}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._what is not None:
            yield Text.assemble(self._line(self._what), no_wrap=True, overflow="ellipsis")
