"""Write to standard error so that its end does not end a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any


class Stderr:
    """The current standard error of the process. A closed reader or terminal does not end a run."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        self._try(lambda: sys.stderr.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: sys.stderr.flush())

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # the rest of its buffer is discarded
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
