"""Compute mean and spread over seeds, and differences between groups with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95

ROUNDING = 1e-9
"""Percentage points of standard error that are rounding errors of the figures."""


def t_bound(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return t such that Student's T with `freedom` > 0 degrees of freedom lies in [-t, t] with this probability."""
    from scipy.special import stdtrit  # imported here, since it takes long and few commands need it

    return float(stdtrit(freedom, (1 + confidence) / 2))


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample, n - 1; None for a single value) of a figure over seeds."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


class Difference(NamedTuple):
    """A mean difference and its confidence interval.

    `method` (paired, welch), `freedom` and the interval are None for one seed. If the difference is the same with every
    seed, its variation cannot be estimated, and only the interval is None.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    method: str | None = None
    freedom: float | None = None

    @property
    def constant(self) -> bool:
        """Return whether several seeds were compared and all differences are equal."""
        return self.freedom is not None and self.low is None


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return how far `ours` is above `theirs`, figures by seed: paired if the seeds are the same, else by Welch's
    method.
    """
    if ours.keys() == theirs.keys():
        gains = Spread.of([ours[seed] - theirs[seed] for seed in sorted(ours)])
        error, freedom, method = (gains.sd or 0) / math.sqrt(len(ours)), len(ours) - 1.0, "paired"
        mean = gains.mean
    else:
        a, b = Spread.of(list(ours.values())), Spread.of(list(theirs.values()))
        mean, method = a.mean - b.mean, "welch"
        error, freedom = _welch(a, b) if min(len(ours), len(theirs)) > 1 else (0.0, 0.0)
    if freedom <= 0:
        return Difference(mean)
    if error < ROUNDING:
        return Difference(mean, None, None, method, freedom)
    half = t_bound(freedom) * error
    return Difference(mean, mean - half, mean + half, method, freedom)


def _welch(a: Spread, b: Spread) -> tuple[float, float]:
    """Return the standard error of the difference of two means, and its degrees of freedom (Welch-Satterthwaite)."""
    parts = [((part.sd or 0.0) ** 2 / len(part.values), len(part.values) - 1) for part in (a, b)]
    variance = sum(part for part, _ in parts)
    if not variance:
        return 0.0, float(sum(freedom for _, freedom in parts))
    return math.sqrt(variance), variance**2 / sum(part**2 / freedom for part, freedom in parts)
