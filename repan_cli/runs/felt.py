"""Compute the effect of a restart on training: mean losses over the steps around it, from the records of epochs.

A window of 50 or 200 steps begins with an epoch and continues into the following ones, or ends with an epoch and
reaches back. For an epoch that it covers whole, it needs the epoch's loss. For the last epoch it needs a part, and the
part's length is the same for all epochs of a run, since they have equally many steps. So the records of any run give
the loss of such a window at any epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADS = (50, 200)
"""The lengths in steps of the windows after a restart."""

TAIL = 200
"""The length in steps of the window before it."""

KEYS = (*(f"loss_head_{window}" for window in HEADS), f"loss_tail_{TAIL}")
"""The keys in a record: the mean loss over an epoch's first `part(window)` steps, and over its last."""

Records = Sequence[Mapping[str, Any]]
"""Records of epochs in order, as in metrics.jsonl."""


def part(window: int, steps: int) -> int:
    """Return the number of steps of an epoch of `steps` that a window covers: all, or those left after whole epochs."""
    return window if window <= steps else window % steps


def marks(steps: int) -> tuple[int, ...]:
    """Return the steps of an epoch at which the loss sums are stored: the ends of heads, and the start of the tail."""
    return (*(part(window, steps) for window in HEADS), steps - part(TAIL, steps))


@dataclass(frozen=True)
class Pace:
    """The size of an epoch: its images, the batch size, and the batches in each update."""

    images: int
    batch_size: int
    accumulate: int = 1

    def images_after(self, step: int) -> int:
        """Return the number of images seen after the update that contains this step, counted from 1."""
        updates = math.ceil(step / self.accumulate)
        return min(updates * self.accumulate * self.batch_size, self.images)


def loss_after(records: Records, window: int, pace: Pace) -> float | None:
    """Return the mean loss over the first steps of `records`, or all if they are fewer; None if one is not known."""
    return _mean(records, window, pace, f"loss_head_{window}", lambda steps, rest: pace.images_after(rest))


def loss_before(records: Records, window: int, pace: Pace) -> float | None:
    """Return the mean loss over the last steps of `records`, like `loss_after`."""

    def images(steps: int, rest: int) -> int:
        return pace.images_after(steps) - pace.images_after(steps - rest)

    return _mean(records[::-1], window, pace, f"loss_tail_{window}", images)


def _mean(records: Records, window: int, pace: Pace, key: str, images_of: Any) -> float | None:
    """Return the mean over as many whole records as the window covers, and a part of the next."""
    total, images = 0.0, 0
    for record in records:
        steps = record.get("steps")
        if not window or steps is None:
            break
        whole = window >= steps
        count = pace.images_after(steps) if whole else images_of(steps, window)
        loss = record.get("loss" if whole else key)
        if loss is None:
            return None
        total, images, window = total + loss * count, images + count, max(window - steps, 0)
    return total / images if images else None


def covered(courses: Iterable[Records], window: int) -> str:
    """Return the number of steps that a window covers at the start of each list of records: 200, or 123 if there are
    fewer.

    If the lists differ, it is the lowest and the highest number: 123-200.
    """
    lengths = (sum(record.get("steps") or 0 for record in records) for records in courses)
    found = sorted({min(window, length) for length in lengths if length}) or [window]
    return "-".join(str(number) for number in dict.fromkeys((found[0], found[-1])))


def around(records: Records, cycle: int, pace: Pace) -> dict[str, float | None]:
    """Return mean training losses around the start of a cycle.

    They cover the last 200 steps of the previous phase, and the cycle's own first 50 and 200, or as many as there are.
    """
    before = [record for record in records if record["cycle"] == cycle - 1]
    after = [record for record in records if record["cycle"] == cycle]
    return {
        f"before_{TAIL}": loss_before(before, TAIL, pace),
        **{f"first_{window}": loss_after(after, window, pace) for window in HEADS},
    }
