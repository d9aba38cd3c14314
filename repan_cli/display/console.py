"""Print everything that users see while repan works, on stderr: header, live display, epoch lines, summary.

On a terminal a live display shows the position of the run. Elsewhere plain lines do, at least one per minute. Permanent
lines also go to the run's log.txt. This module knows floats and names only, never a tensor.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from repan_cli.display.activity import Activity
from repan_cli.display.live import Position, View, figures
from repan_cli.display.notebook import NotebookLive
from repan_cli.display.streams import Stderr
from repan_cli.display.tables import as_list, fits
from repan_cli.runs import felt
from repan_cli.runs.directory import Heartbeat
from repan_cli.system.notices import LOGGER, watched_by
from repan_cli.system.text import count, duration, loss_text, percent, shown, wrapped
from repan_cli.training.events import CycleEnd, CycleStart, Epoch, Event, LossLog, StepEnd

SECONDS_BETWEEN_LINES = 30
REFRESHES = 5
NAME_WIDTH = 14
LOSS_JUMP = 0.5
JUMPED = "the restart kept the function in eval mode only"
ROSE = "a lower learning rate keeps it lower"
COLUMNS = "{:<11} {:>7} {:>7} {:>6} {:>7} {:>8}{:>8} {:>7}"
WITHOUT_RATE = "{:<11} {:>7} {:>7} {:>6} {:>7} {:>8} {:>7}"
WARNING = "bold magenta"
"""Readable on white and on black, unlike yellow."""


@functools.cache
def on_stderr() -> Console:
    """Return the only console for messages; only the console of a live display can print lines above it."""
    return Console(file=cast("TextIO", Stderr()), highlight=False)


class Display:
    """Shows one run.

    Attributes:
        epochs: the length of each phase; the baseline is cycle 0.
        steps: the number of steps in an epoch.
        compiles: whether the first step takes long.
        ramps: whether the attach rate changes.
        jumped: explains a training loss that rose across a restart.
        rose: explains one that rose in the first steps after it.
    """

    def __init__(
        self,
        *,
        epochs: Mapping[int, int],
        steps: int,
        log: Path | None = None,
        compiles: bool = False,
        ramps: bool = True,
        jumped: str = JUMPED,
        rose: str = ROSE,
    ) -> None:
        self.epochs, self.compiles, self.ramps, self.titled = epochs, compiles, ramps, False
        self.jumped, self.rose = jumped, rose
        self.loss = 0.0  # of the last epoch
        self.loss_restarted: float | None = None  # what it was at a restart, until the first epoch after it ends
        self.position = Position(epochs, steps, cycle=min(epochs))
        self.view = View(self.position, self.name)
        self.console = on_stderr()
        self.log = log.open("a", encoding="utf-8") if log else None
        self.live = self._live()
        self.pulse = Heartbeat(self.speak, seconds=5)
        self.spoke = self.began = time.monotonic()

    def _live(self) -> Live | NotebookLive | None:
        """Return a live display, or None if nothing can be redrawn: in a file, a pipe, a dumb terminal."""
        if self.console.is_jupyter:
            return NotebookLive(self.view)
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return None
        return Live(self.view, console=self.console, refresh_per_second=REFRESHES, transient=True)

    def __enter__(self) -> Display:
        self.position.doing = "starting"
        self.watching = watched_by(self.busy)
        self.watching.__enter__()
        (self.live or self.pulse).start()
        return self

    def __exit__(self, *failure: object) -> None:
        (self.live or self.pulse).stop()
        self.watching.__exit__(None, None, None)

    def busy(self, what: str | None) -> None:
        """Show the current activity in place of the count of steps."""
        self.position.doing = what or ""

    def speak(self) -> None:
        """Print the position of the run after a long silence, if there is no live display."""
        if time.monotonic() - self.spoke > SECONDS_BETWEEN_LINES:
            here = self.position
            where = here.doing or f"step {here.step}/{here.steps}"
            place = f"{self.name(here.cycle)}, epoch {here.epoch}/{self.epochs[here.cycle]}, {where}"
            self.say(f"{place}  {figures(here)}".rstrip())

    def close(self) -> None:
        if self.log:
            self.log.close()

    def say(self, text: str | Text | Table = "") -> None:
        """Print a permanent line, on screen and in log.txt."""
        if isinstance(text, str):
            text = shown(text)
        self.console.print(text, soft_wrap=not isinstance(text, Table), markup=False)
        self.spoke = time.monotonic()
        if self.log:
            Console(file=self.log, width=120, no_color=True, force_jupyter=False, force_terminal=False).print(
                text, soft_wrap=True, markup=False
            )
            self.log.flush()

    def note(self, text: str) -> None:
        """Write a line only to log.txt, for text that appears elsewhere on screen."""
        if self.log:
            print(shown(text), file=self.log, flush=True)

    def facts(self, rows: Mapping[str, str]) -> None:
        """Print rows of a name and a text, wrapped between words so that paths stay whole."""
        margin = " " * NAME_WIDTH
        for name, text in rows.items():
            width = max(self.console.width - NAME_WIDTH, 20)
            lines = textwrap.wrap(shown(text), width, break_long_words=False, break_on_hyphens=False)
            self.say(Text.assemble((name.ljust(NAME_WIDTH), "bold"), f"\n{margin}".join(lines)))

    def command(self, name: str, text: str) -> None:
        """Print a command to copy: never wrapped."""
        self.say(Text.assemble((name.ljust(NAME_WIDTH), "bold"), shown(text)))

    def name(self, cycle: int) -> str:
        """Return the name of a phase."""
        if len(self.epochs) == 1 and cycle == 0:
            return "train"
        return "baseline" if cycle == 0 else f"cycle {cycle}/{max(self.epochs)}"

    def show(self, event: Event) -> None:
        """Show one event of the training loop."""
        match event:
            case CycleStart():
                self._start(event)
            case LossLog():
                self._log_loss(event)
            case StepEnd():
                self._end_step(event)
            case Epoch():
                self._epoch(event)
            case CycleEnd():
                self._end(event)

    def _start(self, event: CycleStart) -> None:
        name = self.name(event.cycle)
        self.position.cycle, self.position.epoch, self.position.step = event.cycle, 1, 0
        self.position.doing = "training"
        self.loss_restarted = max(self.loss, event.loss_after_restart or 0.0) if event.restarted else None
        if event.restarted:
            blocks = count(event.blocks, "block")
            self.say(f"{name}: merged and regrew {blocks}; logits moved by {event.logit_error:.0e}")
            before, after = event.loss_before or 0.0, event.loss_after_restart or 0.0
            loss = f"training loss {loss_text(before)} -> {loss_text(after)}"
            val = f", val {percent(event.top1_before)} -> {percent(event.top1_after_restart)}"
            self.say(loss + (val if event.top1_before is not None else ""))
            if after > before + LOSS_JUMP:
                self.say(_warning(self.jumped))
        elif event.cycle:
            done = f"rescaled {count(event.blocks, 'trunk')}" if event.blocks else "no restart"
            self.say(f"{name}: {done} (control), momentum {'kept' if event.carried else 'zeroed'}")
        if event.zero_gammas:
            channels = count(event.zero_gammas, "channel")
            self.say(f"{channels} had gamma 0, by which cycle.rule=running cannot divide: gamma set to 1")
        if self.compiles:
            self.say("compiling the training pass (run.compile=on); the first step waits for it")
            self.position.doing, self.began = "compiling", time.monotonic()
        self._title()

    def _title(self) -> None:
        self.titled = True
        titles = self._row(["phase", "epoch", "loss", "train", "val", "lr", "attach", "img/s"])
        self.say(Text(f"{titles}  *: best", style="bold"))

    def _row(self, cells: list[str]) -> str:
        """Return a row of the table of epochs; an attach rate that never changes has no column."""
        if self.ramps:
            return COLUMNS.format(*cells)
        return WITHOUT_RATE.format(*cells[:-2], cells[-1])

    def _log_loss(self, event: LossLog) -> None:
        names = ("loss", "lr", *(("attach_rate",) if self.ramps else ()), "images_per_second")
        self.position.figures = {name: getattr(event, name) for name in names}
        self._end_step(event)

    def _end_step(self, event: LossLog | StepEnd) -> None:
        self.position.move(event)
        if self.compiles:
            self.compiles = False
            self.say(f"compiled, {duration(time.monotonic() - self.began)} with the first step")

    def _epoch(self, event: Epoch) -> None:
        if event.val_top1 is not None:
            here = self.position
            here.val, here.best = event.val_top1, event.val_top1 if event.best else max(here.best or 0, event.val_top1)
        if not self.titled:  # a run that was resumed within a phase
            self._title()
        cells = [
            self.name(event.cycle),
            f"{event.epoch}/{self.epochs[event.cycle]}",
            loss_text(event.loss),
            percent(event.train_top1),
            percent(event.val_top1) + ("*" if event.best else " "),
            f"{event.lr:.4f}",
            f"{event.attach_rate:.2f}",
            f"{event.images_per_second:,.0f}",
        ]
        line = self._row(cells)
        self.say(Text(line, style="bold" if event.best else ""))
        before, self.loss_restarted, self.loss = self.loss_restarted, None, event.loss
        if before is not None and event.first_loss > before + LOSS_JUMP:
            rise = f"from {loss_text(before)} to {loss_text(event.first_loss)}"
            self.say(_warning(f"the training loss rose {rise} in the first steps after the restart: {self.rose}"))

    def _end(self, event: CycleEnd) -> None:
        val = f"val {percent(event.top1)}, " if event.top1 is not None else ""
        self.position.doing = "restart" if event.cycle < max(self.epochs) else "ending"
        self.say(f"{self.name(event.cycle)}: {val}test {percent(event.test_top1)}, {duration(event.seconds)}")

    def table(self, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]] = ()) -> None:
        """Print a row per phase: validation top-1 and training loss around its start, top-1 at its end, time.

        The `records` of the epochs give the number of steps over which losses were averaged.
        """
        cycles = [[each for each in records if each["cycle"] == row["cycle"]] for row in summary["cycles"]]
        windows = [felt.covered(cycles, window) for window in felt.HEADS]
        if len(set(windows)) == 1:  # short phases, whose windows are the same steps
            after = [f"all\n{windows[0]}\nsteps"]
        else:
            after = [f"first\n{window}\nsteps" for window in windows]
        titles = ("phase", "val\nbefore", "after\nrestart", "loss\nbefore", *after, "val\nat end", "test", "time")
        unknown = [""] * (3 + len(after))
        rows = [(self.name(0) if 0 in self.epochs else "start", *unknown, *_figures(summary["baseline"]))]
        for row in summary["cycles"]:
            around = percent(row["top1_before"]), percent(row["top1_after_restart"])
            around_it = ["-" if loss is None else loss_text(loss) for loss in _felt(row)][: 1 + len(after)]
            rows.append((self.name(row["cycle"]), *around, *around_it, *_figures(row)))
        self.say()
        self.say(
            _right_aligned(titles, rows)
            if fits(titles, rows, self.console.width)
            else as_list(titles, rows, self.console.width)
        )


def _right_aligned(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of figures, with the names of their rows on the left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == titles[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _felt(row: Mapping[str, Any]) -> Iterable[float | None]:
    """Return training losses around a restart; none for runs begun by a version that did not record them."""
    return row["felt"].values() if "felt" in row else [None] * 3


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return percent(row["top1"]), percent(row["test_top1"]), duration(row["seconds"])


def print_line(text: str, *, whole: bool = False) -> None:
    """Print a line of a command's results on stdout.

    On a terminal it wraps between words, unless it is code to copy and therefore `whole`.
    """
    text = shown(text)
    print(text if whole or not sys.stdout.isatty() else wrapped(text, shutil.get_terminal_size().columns))


def tell(text: str) -> None:
    """Print a line on stderr; on a terminal it wraps between words."""
    on_stderr().print(_on_terminal(shown(text)), soft_wrap=True, markup=False)


def _on_terminal(text: str, before: int = 0) -> str:
    """Wrap a sentence if stderr is a terminal, after the columns that are already used."""
    console = on_stderr()
    return wrapped(text, console.width, before=before) if console.is_terminal else text


def _warning(text: str) -> Text:
    said = "Warning: "
    return Text.assemble((said, WARNING), _on_terminal(text, len(said)))


class _NoticeHandler(logging.Handler):
    """Prints notices on stderr, above a live display if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        on_stderr().print(_warning(shown(record.getMessage())), soft_wrap=True)


@contextlib.contextmanager
def showing_activity() -> Iterator[None]:
    """Show long activities within the context."""
    with watched_by(Activity(on_stderr())):
        yield


def show_notices() -> None:
    """Print warnings of the package on stderr from now on, each as a line that begins with 'Warning:'."""
    if not LOGGER.handlers:
        LOGGER.addHandler(_NoticeHandler())
        LOGGER.propagate = False
