"""Ask the operating system about this machine: cores, memory, processor. Every answer exists on every system."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path


def usable_cores() -> int:
    """Return how many cores this process may use: those it is bound to, where the system can bind one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(*, free: bool = False) -> int | None:
    """Return the machine's memory in bytes, or what of it is free; None on systems that do not tell, as Windows."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_AVPHYS_PAGES" if free else "SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not tell what is free
        return None


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has held; None on systems that do not tell, as Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """Return the name that the machine's processor gives itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
