"""Estimate the sampling error of a share of images, such as test accuracy."""

from __future__ import annotations

import math
import statistics

CONFIDENCE = 0.95
FEWEST = 5
"""The number of images right, and wrong, below which an interval replaces the standard error."""


def standard_error(share: float, images: int) -> float:
    """Return the standard error of a share of this number of images, both in percent."""
    part = _fraction(share)
    return 100 * math.sqrt(part * (1 - part) / images)


def interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval by Wilson's score, in percent; it has a width even at 0 and 100 %."""
    part, square = _fraction(share), statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    middle = (images * part + square / 2) / (images + square)
    half = math.sqrt(square * (images * part * (1 - part) + square / 4)) / (images + square)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def is_extreme(share: float, images: int) -> bool:
    """Return whether a share is so near 0 or 100 % that a standard error does not describe its sampling error."""
    part = _fraction(share)
    return round(min(part, 1 - part) * images, 6) < FEWEST


def with_error(share: float, images: int) -> str:
    """Show a share with its sampling error: 70.00 ± 2.29, or near 0 and 100 % 100.00 [60.97, 100.00]."""
    if is_extreme(share, images):
        low, high = interval(share, images)
        return f"{share:.2f} [{low:.2f}, {high:.2f}]"
    return f"{share:.2f} ± {standard_error(share, images):.2f}"


def _fraction(share: float) -> float:
    return min(max(share / 100, 0.0), 1.0)
