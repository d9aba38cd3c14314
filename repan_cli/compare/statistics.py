"""Mean and spread over seeds, and differences between groups with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


# ---------------------------------------------------------------------------------------------- Student's t


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly its mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _continued_fraction(a, b, x) / a


def _continued_fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / _not_zero(1 + term * d), _not_zero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return fraction


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def t_bound(freedom: float, confidence: float = CONFIDENCE) -> float:
    """t such that Student's T with `freedom` > 0 degrees of freedom lies within -t and t with this probability.

    P(|T| > t) = I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + t^2), which grows with x: halving finds x.
    """
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if incomplete_beta(freedom / 2, 0.5, middle) < 1 - confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom * (1 - high) / high)


# ---------------------------------------------------------------------------------------------- spread, difference


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample, n - 1; None for a single value) of a figure over seeds."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


class Difference(NamedTuple):
    """A mean difference and its confidence interval; `method` (paired, welch) and interval are None for one seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    method: str | None = None
    freedom: float | None = None


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """How far `ours` lie above `theirs`, figures by seed: paired where both have the same seeds, else by Welch."""
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
    half = t_bound(freedom) * error
    return Difference(mean, mean - half, mean + half, method, freedom)


def _welch(a: Spread, b: Spread) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom (Welch-Satterthwaite)."""
    parts = [(part.sd**2 / len(part.values), len(part.values) - 1) for part in (a, b)]
    variance = sum(part for part, _ in parts)
    if not variance:
        return 0.0, float(sum(freedom for _, freedom in parts))
    return math.sqrt(variance), variance**2 / sum(part**2 / freedom for part, freedom in parts)
