"""Get information on this machine from the operating system: cores, memory, processor.

Every function works on every system.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""The folder of Linux's control groups, by which containers and clusters set limits, and the list of one's own."""

MEMORY = Path("/proc/meminfo")
"""The file in which Linux tells the use of its memory."""

PROC_STAT = Path("/proc/stat")
"""The file in which Linux gives the used time of each core."""

SAMPLE = 0.2
"""Seconds over which the use of cores is measured."""


def usable_cores() -> int:
    """Return the number of cores that this process may use: those it is bound to, or fewer by a container's limit."""
    return min([_bound_cores(), *_core_limits()])


def _bound_cores() -> int:
    """Return the number of cores that this process is bound to, or that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores() -> int:
    """Return the number of usable cores that are idle now, at least 1.

    Low-priority work (nice) counts as idle. This takes 0.2 s on Linux.
    """
    return max(1, min(_bound_cores() - _busy_cores(), usable_cores()))


def _busy_cores() -> int:
    try:
        before = _core_times()
        time.sleep(SAMPLE)
        after = _core_times()
    except (OSError, ValueError, IndexError):  # not Linux
        return round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    busy = 0.0
    for core, (used, total) in after.items():
        passed = total - before[core][1] if core in before else 0
        busy += (used - before[core][0]) / passed if passed else 0
    return round(busy)


def _core_times() -> dict[int, tuple[int, int]]:
    """Return the used and the total time of each usable core, from /proc/stat."""
    usable: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    times = {}
    for line in PROC_STAT.read_text(encoding="utf-8").splitlines():
        name, *figures = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in usable:
            user, nice, system, idle, wait, *others = map(int, figures[:8])  # interrupts, and time stolen by a host
            used = user + system + sum(others)
            times[int(name[3:])] = used, used + nice + idle + wait
    return times


def _core_limits() -> list[int]:
    """Return the limit of each control group that holds this process, in cores used at once, rounded up."""
    found = []
    for folder, is_first in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such folder, as in a container, or "max": no limit
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first else ("cpu.max",)
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            if int(quota) > 0:
                found.append(-(-int(quota) // int(period)))
    return found


def memory_bytes(*, free: bool = False) -> int | None:
    """Return the machine's memory in bytes, total or free; None on systems that do not report it, such as Windows.

    Memory that only holds files which can be read again is free. The limit of a container, or of a job of a cluster,
    counts: a process that takes more is killed.
    """
    if sys.platform == "win32":
        return None
    try:
        there = os.sysconf("SC_AVPHYS_PAGES" if free else "SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not report free memory
        return None
    if free:
        there = max(there, _available())
    return min([there, *(left if free else limit for limit, left in _memory_limits())])


def _available() -> int:
    """Return the memory that Linux can give to programs, in bytes; 0 on other systems.

    After an epoch of images from disk nearly all memory holds files, and little of it counts as unused.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in MEMORY.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(value.split()[0])
    return 0


def _memory_limits() -> list[tuple[int, int]]:
    """Return the limit of each control group that holds this process, and what is left of it, in bytes.

    Files that the group has read count as used, but are dropped when memory is needed.
    """
    found = []
    for folder, is_first in _groups("memory"):
        limit, used, files = OF_GROUPS_1 if is_first else OF_GROUPS_2
        with contextlib.suppress(OSError, ValueError):  # no such folder, as in a container, or no limit
            most = int((folder / limit).read_text(encoding="utf-8"))
            taken = int((folder / used).read_text(encoding="utf-8"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            found.append((most, max(0, most - taken + int(stat.get(files, 0)))))
    return found


OF_GROUPS_2 = ("memory.max", "memory.current", "inactive_file")
OF_GROUPS_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""The files of the limit and of the used bytes of a control group, and the entry of its files' bytes in memory.stat."""


def _groups(kind: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the control groups that hold this process, and whether they are of version 1.

    Groups of version 1 limit one `kind` each, "cpu" or "memory".
    """
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and kind not in kinds.split(","):
                continue
            top, own = GROUPS / kind if kinds else GROUPS, Path(path.lstrip("/"))
            for inner in (own, *own.parents):
                yield top / inner, bool(kinds)


def peak_memory() -> int | None:
    """Return the largest number of bytes that this process has held; None on systems that do not report it, such as
    Windows.
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """Return the processor's name for itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
