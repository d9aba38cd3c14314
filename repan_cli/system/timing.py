"""Measure time on busy machines: all cases take turns in one process, so that the ratios of medians are reliable."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WINDOW = 0.05
"""The least number of seconds that a case runs before the next one takes its turn."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over windows, and the first and third quartile."""

    median: float
    low: float
    high: float
    windows: int


def interleaved(
    cases: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time the cases in turn for about `seconds` each, at least `least` windows; the first call of each is a warm-up.

    On a GPU every window ends with a wait for the device.
    """
    calls = {name: _calls_for_a_window(case, device) for name, case in cases.items()}
    found: dict[str, list[float]] = {name: [] for name in cases}
    began = time.perf_counter()
    while len(next(iter(found.values()))) < least or time.perf_counter() - began < seconds * len(cases):
        for name, case in cases.items():
            found[name].append(_window(case, calls[name], device))
    return {name: _summary(windows) for name, windows in found.items()}


def _calls_for_a_window(case: Callable[[], object], device: torch.device | None) -> int:
    case()
    once = min(_window(case, 1, device) for _ in range(2))
    return max(1, round(WINDOW / once))


def _window(case: Callable[[], object], calls: int, device: torch.device | None) -> float:
    """Return the seconds per call."""
    began = time.perf_counter()
    for _ in range(calls):
        case()
    wait(device)
    return (time.perf_counter() - began) / calls


def wait(device: torch.device | None) -> None:
    """Wait until a GPU has finished its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


def _summary(windows: list[float]) -> Timing:
    low, median, high = statistics.quantiles(windows, n=4) if len(windows) > 1 else windows * 3
    return Timing(median, low, high, len(windows))
