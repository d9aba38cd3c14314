"""Errors that users see: one line that names the thing and the fix, and the process's exit code."""

from __future__ import annotations

import errno
import re
from pathlib import Path


class RepanError(Exception):
    """A run failed for a reason that is worth one line instead of a traceback."""

    exit_code = 1
    label = "Error"
    """The word before the line."""


class MergeError(RepanError):
    """A merged network does not equal the network it came from: a bug, so nothing is written."""


class InputError(RepanError, ValueError):
    """The user gave an option, a setting, a file or a data set that cannot be used."""

    exit_code = 2


class DivergedError(RepanError):
    """The training loss stopped being a finite number."""

    exit_code = 3


FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))
"""The error numbers of a full disk."""


TOO_MANY = (errno.EMFILE, errno.ENFILE)
"""The error numbers of too many open files."""


FORBIDDEN = (errno.EACCES, errno.EPERM)
"""The error numbers of a file that this user may not read."""


OUT_OF_REACH = tuple(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ENXIO", "ENODEV", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "ENOLINK", "ENOLCK"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED"),
    )
    if hasattr(errno, name)
)
"""The error numbers of a disk that fails, or of a network drive that does not answer."""


NO_MEMORY = (
    *("can't allocate memory", "failed to map segment", "can't start new thread"),
    *("CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"),
)
"""The messages with which PyTorch, the dynamic loader, Python and GPU libraries report that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the machine or a GPU ran out of memory."""
    said = isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in NO_MEMORY)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or said or by_system


UNORDERED = re.compile(r"(\S+) does not have a deterministic implementation, but you set")


def unordered(error: BaseException) -> InputError | None:
    """Return the error to raise if PyTorch refused an operator because of `run.deterministic`, else None."""
    found = UNORDERED.match(str(error)) if isinstance(error, RuntimeError) else None
    return found and InputError(f"run.deterministic: {found[1]} has no deterministic kernel; set it to false")


class OutOfSpaceError(RepanError):
    """The disk or the memory is full."""

    exit_code = 4


class OutOfReachError(RepanError):
    """A disk or a network drive does not deliver files that are there."""

    exit_code = 1


class LostRankError(RepanError):
    """Another rank of the run has ended, or does not answer."""

    exit_code = 1


def lost_rank(error: BaseException) -> bool:
    """Return whether an error reports a lost rank; PyTorch has no exception class for it."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in str(error) or "NCCL" in str(error)
    )


class StuckLoaderError(RepanError):
    """The processes that load images stopped delivering them."""

    exit_code = 1


class InterruptedRunError(RepanError):
    """Ctrl-C. `path` is the folder of the run to resume, if there is one."""

    exit_code = 130
    label = "Stopped"

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class PreemptedRunError(RepanError):
    """A signal asked the run to stop; it can be resumed from its last save."""

    exit_code = 75
    label = "Stopped"


class StoppedError(RepanError):
    """The loop was asked to stop, between two updates."""
