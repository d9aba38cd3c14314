"""Draw the live display of a run: its position, the remaining time, its figures.

Colors have enough contrast on light and on dark backgrounds. They carry no information that is not also in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from repan_cli.training.events import LossLog, StepEnd

WIDE = 130
BAR, BACK = "magenta", "bright_black"
"""Colors of the terminal's own palette, which themes adapt; in xterm's, the contrast to white and black is over 3."""


def clock(seconds: float | None) -> str:
    """Format the remaining time: 0:07, 12:40, 3:05:00."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@dataclass
class Position:
    """The position of a run, from its events. `doing` replaces the count of steps when the run is not training.

    `figures` are those of the last `LossLog` event; `val` and `best` are validation top-1 in percent.
    """

    epochs: Mapping[int, int]
    steps: int
    cycle: int = 0
    epoch: int = 1
    step: int = 0
    doing: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    val: float | None = None
    best: float | None = None
    pace: Pace = field(default_factory=lambda: Pace())

    def move(self, event: LossLog | StepEnd, now: float | None = None) -> None:
        """Move to the step of an event."""
        now = time.monotonic() if now is None else now
        if (event.cycle, event.epoch) != (self.cycle, self.epoch) or self.step == 0:
            self.pace.new_epoch(event.step, now, same_phase=event.cycle == self.cycle)
        self.cycle, self.epoch, self.step = event.cycle, event.epoch, event.step
        self.pace.step(event.step, now)
        self.doing = "" if self.step < self.steps else "scoring"

    def epochs_done(self) -> int:
        """Return the number of whole epochs before the current one."""
        return sum(length for cycle, length in self.epochs.items() if cycle < self.cycle) + self.epoch - 1

    def left(self, now: float) -> tuple[float | None, float | None]:
        """Return the seconds until the end of the epoch and of the run."""
        epoch = self.pace.left(self.steps - self.step, now)
        if epoch is None:
            return None, None
        return epoch, epoch + (sum(self.epochs.values()) - self.epochs_done() - 1) * self.pace.epoch(self.steps)


@dataclass
class Pace:
    """The pace of a run: seconds per step in this epoch, and of the last whole epoch of this phase."""

    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    whole: float | None = None

    def new_epoch(self, step: int, now: float, *, same_phase: bool) -> None:
        self.whole = now - self.first[1] if self.first and same_phase else None
        self.first = (step, now)

    def step(self, step: int, now: float) -> None:
        self.last = (step, now)

    def _of_a_step(self) -> float | None:
        if self.first and self.last and self.last[0] > self.first[0]:
            return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])
        return None

    def epoch(self, steps: int) -> float:
        return self.whole or (self._of_a_step() or 0.0) * steps

    def left(self, steps: int, now: float) -> float | None:
        pace = self._of_a_step()
        return None if pace is None or self.last is None else max(0.0, steps * pace - (now - self.last[1]))


class View:
    """Draws a position; `name` returns the name of a phase."""

    def __init__(self, position: Position, name: Callable[[int], str]) -> None:
        self.position, self.name = position, name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        here, wide = self.position, options.max_width >= WIDE
        epoch_left, run_left = here.left(time.monotonic())
        total, done = sum(here.epochs.values()), here.epochs_done()
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        counted = max(len(f"{here.steps}/{here.steps}"), len("compiling"))
        for width in (len("cycle 10/10"), len(f"epoch {total}/{total}")):
            grid.add_column(min_width=width, no_wrap=True, overflow="crop")
        grid.add_column(ratio=1)
        for width in (counted, len("59:59 left")):  # fixed widths keep bars in place
            grid.add_column(min_width=width, justify="right", no_wrap=True, overflow="crop")
        if wide:
            grid.add_column(no_wrap=True, overflow="crop")
        grid.add_row(
            Text(self.name(here.cycle), "bold"),
            f"epoch {here.epoch}/{here.epochs.get(here.cycle, 0)}",
            _bar(here.step, here.steps),
            here.doing or f"{here.step}/{here.steps}",
            f"{clock(epoch_left)} left",
            *([figures(here)] if wide else []),
        )
        grid.add_row(
            "whole run",
            f"epoch {done + 1}/{total}",
            _bar(done * here.steps + here.step, total * here.steps),
            f"{100 * (done * here.steps + here.step) / max(total * here.steps, 1):.0f} %",
            f"{clock(run_left)} left",
            *([""] if wide else []),
        )
        yield grid
        if not wide:
            yield Text(figures(here), no_wrap=True, overflow="crop")


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, complete_style=BAR, finished_style=BAR, style=BACK)


def figures(here: Position) -> str:
    """Return loss, validation, rates and speed in a row, as far as they are known."""
    rates = {"lr": "lr {:.4f}", "attach_rate": "attach {:.2f}", "images_per_second": "{:,.0f} img/s"}
    texts = {"loss": "loss {:.3f}", **rates}
    known = [text.format(here.figures[name]) for name, text in texts.items() if name in here.figures]
    if here.val is not None and known:
        known.insert(1, f"val {here.val:.2f}, best {here.best:.2f}*")
    return "  ".join(known)
