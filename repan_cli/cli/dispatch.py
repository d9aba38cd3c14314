"""Run a command: import it, show that this takes a moment, and turn errors into lines and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from repan_cli.errors import (
    FULL,
    TOO_MANY,
    InputError,
    InterruptedRunError,
    LostRankError,
    OutOfSpaceError,
    RepanError,
    StuckLoaderError,
    is_out_of_memory,
    lost_rank,
    unordered,
)
from repan_cli.system.launcher import own_rank, rank_count
from repan_cli.system.lean import lean_imports
from repan_cli.system.notices import LOGGER
from repan_cli.system.text import first_line, shown, wrapped

WITHOUT_TORCH = ("list_names", "version", "compare", "study")
"""Modules of commands that start at once."""


def dispatch(module: str, *arguments: Any, entry: str = "run", **options: Any) -> None:
    """Import a command's module and run it; an error becomes its lines on stderr and its exit code."""
    try:
        console = importlib.import_module("repan_cli.display.console")
        console.show_notices()
        importlib.import_module("repan_cli.commands.early").check(module, *arguments)
        with _loading(module), lean_imports():
            command = importlib.import_module(f"repan_cli.commands.{module}")
        with console.showing_activity():
            getattr(command, entry)(*arguments, **options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail(_stopped(module, entry))
    except Exception as error:
        fail(error)


def _stopped(module: str, entry: str) -> InterruptedRunError:
    """Return the error for Ctrl-C outside training, which saves and reports by itself."""
    if entry == "go_on":
        return InterruptedRunError("stopped before the run continued; its last save is whole")
    if module in ("train", "series"):
        return InterruptedRunError("stopped before the run began; nothing was written")
    return InterruptedRunError("stopped before the command finished")


@contextlib.contextmanager
def _loading(module: str) -> Iterator[None]:
    """Show on a terminal what takes the first seconds, and erase it afterward."""
    waits = module not in WITHOUT_TORCH and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if waits:
        print("loading PyTorch ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if waits:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _FirstNotice(logging.Handler):
    """Load the display when a notice is sent, and hand the notice to it."""

    def emit(self, record: logging.LogRecord) -> None:
        LOGGER.removeHandler(self)
        importlib.import_module("repan_cli.display.console").show_notices()
        LOGGER.handle(record)


@contextlib.contextmanager
def notices_shown() -> Iterator[None]:
    """Print notices that are sent within the context, which few commands send before `dispatch` loads the display."""
    waiting = _FirstNotice()
    if not LOGGER.handlers:
        LOGGER.addHandler(waiting)
    try:
        yield
    finally:
        LOGGER.removeHandler(waiting)


def debugging() -> bool:
    """Return whether errors keep their traceback."""
    return os.environ.get("REPAN_DEBUG") == "1"


def fail(error: Exception) -> NoReturn:
    """Print the error in one line and exit with its code; an unexpected error keeps its traceback."""
    known = _as_known(error)
    if known is None or debugging():
        raise error
    rank = own_rank()
    with contextlib.suppress(OSError):  # stderr may be closed
        for line in shown(str(known)).split("\n"):
            say_error(line, known.label, rank)
    raise typer.Exit(known.exit_code) from None


def say_error(line: str, label: str = RepanError.label, rank: int = 0) -> None:
    """Print an error, or after `Stopped` the end of a run that was asked to stop, on stderr.

    On a terminal it breaks between words.
    """
    begin = f"{label} on rank {rank}: " if rank else f"{label}: "
    line = line.removeprefix(f"{label.lower()} ")
    if sys.stderr.isatty():
        line = wrapped(line, shutil.get_terminal_size().columns, before=len(begin))
    print(begin + line, file=sys.stderr)


def _as_known(error: Exception) -> RepanError | None:
    if isinstance(error, RepanError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return OutOfSpaceError(
            f"no space left to write {error.filename or 'a file of the run'}: free some space, or give another --out"
        )
    if is_out_of_memory(error):
        return OutOfSpaceError(
            "out of memory: set a smaller --batch-size (with a larger optim.accumulate to match), or a smaller "
            "data.image_size"
        )
    if rank_count() > 1 and lost_rank(error):
        return LostRankError(
            f"another rank is gone or does not answer ({first_line(error)}); continue from the last save with --resume"
        )
    if refused := unordered(error):
        return refused
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return StuckLoaderError(
            f"a process that loads images was lost ({first_line(error)}); continue from the last save with "
            "--resume; if it happens again, set data.workers=0 or provide more memory"
        )
    if isinstance(error, OSError) and error.errno in TOO_MANY:
        return OutOfSpaceError(f"{error.strerror}: raise the system's limit ('ulimit -n'), or set data.workers=0")
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve before Python 3.13
        return InputError(f"cannot use a link that leads to itself: {str(error).rpartition(' from ')[2]}")
    return None
