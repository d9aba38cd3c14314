"""Detect runs that become many times slower, for example because other processes take their cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from repan_cli.system.host import usable_cores
from repan_cli.system.notices import warn
from repan_cli.system.text import count
from repan_cli.training.events import Event, LossLog, StepEnd

WINDOW, SLOW, RECOVERED = 15.0, 0.25, 0.5
"""The length of a window in seconds; the share of the best pace below which a run has collapsed, and the share at which
it has recovered.
"""


class TimeLimit:
    """Tells whether `hours` have passed since it was made; None means no limit."""

    def __init__(self, hours: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.hours, self.now = hours, now
        self.until = None if hours is None else now() + 3600 * hours

    def passed(self) -> bool:
        return self.until is not None and self.now() >= self.until

    def __str__(self) -> str:
        return f"after run.max_hours={self.hours:g}"


class PaceWatch:
    """Watches the pace of a run's steps. Time between epochs is not counted.

    `now` returns the time in seconds.
    """

    def __init__(
        self, batch_size: int, *, threads: int, device: str = "cpu", now: Callable[[], float] = time.monotonic
    ) -> None:
        self.batch_size, self.threads, self.device, self.now = batch_size, threads, device, now
        self.best = 0.0
        self.collapsed = False
        self._last: tuple[int, float] | None = None
        self._steps, self._seconds, self._slow = 0, 0.0, 0

    def take(self, event: Event) -> None:
        """Receive an event; warn if the pace stays collapsed for two windows, once until it recovers."""
        if isinstance(event, LossLog):
            return
        if not isinstance(event, StepEnd):
            self._last = None
            return
        moment = self.now()
        if self._last is not None and event.step > self._last[0]:
            self._steps += event.step - self._last[0]
            self._seconds += moment - self._last[1]
        self._last = (event.step, moment)
        if self._seconds >= WINDOW:
            self._judge(self._steps * self.batch_size / self._seconds)
            self._steps, self._seconds = 0, 0.0

    def _judge(self, speed: float) -> None:
        self._slow = self._slow + 1 if speed < SLOW * self.best else 0
        if self._slow >= 2 and not self.collapsed:
            self.collapsed = True
            warn(f"the run has slowed down to {speed:,.0f} images/s from {self.best:,.0f}: {self._why()}")
        elif speed > RECOVERED * self.best:
            self.collapsed = False
        self.best = max(self.best, speed)

    def _why(self) -> str:
        cores = os.cpu_count() or 1  # as the load, those of the whole machine
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > cores:
            fewer = "; with run.threads=1 on --resume it may be faster" if self.threads > 1 else ""
            return f"other processes use the cores (load {load:.1f}, {cores} cores){fewer}"
        if self.device != "cpu":
            return "other processes use the GPU, or the machine is slower or waits for its disk"
        usable = usable_cores()
        limit = f", is held to its limit of {count(usable, 'core')}," if usable < cores else ""
        return f"the machine is slower{limit} or waits for its disk"
