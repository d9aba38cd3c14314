"""Handle signals that ask a run to stop, and protect the memory on which they are handled."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignals:
    """Within the context, STOP_SIGNALS ask the run to stop; a second SIGINT raises KeyboardInterrupt.

    Calling the object returns whether a signal has arrived. `received` is the first signal; `reason` describes a stop
    without one. Once the process is `leaving`, further signals are ignored. An inner context shares its signals with
    the outer one. `heard` is called with the first signal, in its own thread.
    """

    def __init__(self, heard: Callable[[int], object] | None = None) -> None:
        self.heard = heard
        self.received: int | None = None
        self.reason: str | None = None
        self.leaving = False
        self._outer: StopSignals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # other threads cannot take signals
            heard = (number for number in STOP_SIGNALS if not _is_for_nohup(number))
            self._before = {number: signal.signal(number, self._take) for number in heard}
        outer = getattr(self._before.get(signal.SIGINT), "__self__", None)
        if isinstance(outer, StopSignals):
            self._outer, self.received = outer, outer.received
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT and not self.leaving:
            raise KeyboardInterrupt
        if self.heard and self.received is None and not self.leaving:  # a handler may have interrupted a print
            threading.Thread(target=self.heard, args=(number,), daemon=True).start()
        self.received = self.received or number
        if self._outer:
            self._outer.received = self._outer.received or number

    def __call__(self) -> bool:
        return self.received is not None


def _is_for_nohup(number: int) -> bool:
    """Return whether the process was started so that closing the terminal does not end it."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


class _SignalStack(ctypes.Structure):
    """C's `stack_t` on Linux: the memory on which a thread handles its signals."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore the thread's alternate signal stack at the end of the context.

    OpenVINO's CPU plugin sets its own stack and frees it when a network is closed. If networks are closed in another
    order than they were opened, the thread keeps a freed stack, and the next signal ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    libc, stack = ctypes.CDLL(None), _SignalStack()
    known = libc.sigaltstack(None, ctypes.byref(stack)) == 0
    try:
        yield
    finally:
        if known:
            libc.sigaltstack(ctypes.byref(stack), None)
