"""Protect the process's streams: write errors are reported in one line, and closed streams crash nothing."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from repan_cli.errors import OutOfSpaceError
from repan_cli.system.text import shown


class Stdout(io.TextIOWrapper):
    """A stdout that reports when it cannot be written, and then discards the rest."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._told(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._told(error) from None

    def _told(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):  # its reader has seen enough
            return error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return OutOfSpaceError(f"cannot write to stdout: {error.strerror}")


class ClosedStdout(io.TextIOBase):
    """A replacement for a stdout that was closed before the command began."""

    def write(self, text: str) -> int:
        raise OutOfSpaceError("cannot write to stdout: it is closed")


def open_streams() -> None:
    """Open streams that were closed before the command began, so that no file takes their number and none is None."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    if sys.stdout is None:
        sys.stdout = ClosedStdout()
    elif type(sys.stdout) is io.TextIOWrapper:  # not that of a test
        plain = sys.stdout
        sys.stdout = Stdout(plain.buffer, plain.encoding, plain.errors, line_buffering=plain.line_buffering)
        plain.detach()  # whose end must not close the buffer
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def accept_any_text() -> None:
    """Escape characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print an error on stderr, even if it is closed."""
    with contextlib.suppress(OSError):
        print(shown(text), file=sys.stderr)
