"""Define a teacher: a merged network in eval mode, with its own preprocessing of the student's images, and a cache.

It is not part of the model, so it is neither in the optimizer nor in a checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.data.batches import Batch
from repan_cli.errors import FULL, InputError, OutOfSpaceError
from repan_cli.system.device import Runtime
from repan_cli.system.host import memory_bytes
from repan_cli.system.launcher import local_ranks
from repan_cli.training import casts

CACHE_TOLERANCE = 0.05
"""The largest difference, relative to the largest logit, between the cache and what the teacher returns now.

Rounding, to bfloat16 in batches of another composition, stays below a hundredth.
"""

SHARE_OF_DEVICE, SHARE_OF_HOST = 0.25, 0.5
"""The shares of free memory that the cache may take before it moves to the next slower place."""


@dataclass(frozen=True)
class View:
    """The input that a network expects: the side in pixels, mean and std per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Teacher:
    """Logits of a network for batches that are normalized and sized for the student.

    Args:
        model: the teacher's network, on the runtime's device; it is put in eval mode.
        own: the input that the teacher expects.
        student: the form in which the batches arrive.
    """

    def __init__(self, model: nn.Module, *, own: View, student: View, runtime: Runtime) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = None if own.size == student.size else own.size
        self.runtime = runtime
        own_std, own_mean, std, mean = (
            torch.tensor(values, device=runtime.device).view(1, -1, 1, 1)
            for values in (own.std, own.mean, student.std, student.mean)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the teacher's float32 logits (B, num_classes) of images (B, C, H, W) as the student sees them."""
        images = torch.addcmul(self.shift, images, self.scale)
        if self.size is not None:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        images = images.contiguous(memory_format=self.runtime.memory_format)
        with self.runtime.autocast(), casts.given(*self.lower):
            return self.model(images).float()

    @cached_property
    def lower(self) -> tuple[list[casts.Place], tuple[Tensor, ...]]:
        """Return the weights that autocast would cast for every batch, cast once, since they are not trained."""
        if not torch.is_autocast_enabled(self.runtime.device.type):
            return [], ()
        return casts.kept(self.model, torch.get_autocast_dtype(self.runtime.device.type))

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits(batch.images)

    @property
    def recorded_as(self) -> Hashable:
        """The teacher itself: its network is part of a recorded step, and must live as long."""
        return self

    def prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches unchanged: the teacher sees their images in the step."""
        return batches


class LogitCache:
    """A teacher's logits in float16 by (image, view), computed when a view is first seen.

    The cache is exact for views that have a number: crops and flips. Each is computed once if a run repeats the views
    of its first cycle (`cycle.reseed=same`) or does not augment. The first batch that needs nothing new is computed
    anyway, and compared: a teacher that is not a function of the view alone raises InputError.

    A table on the CPU, where views are numbered, notes which entries are filled; a look-up is no host-device sync.

    Args:
        teacher: computes the logits of views that are not in the cache.
        make_table: called at the first use, for a float16 table (images, views, classes) in any memory.
        together: the number of images, from the coming batches, for which the teacher is called at once.
    """

    def __init__(
        self, teacher: Callable[[Batch], Tensor], make_table: Callable[[], Tensor], *, together: int = 1
    ) -> None:
        self.teacher, self.make_table, self.together = teacher, make_table, together
        self.asked = self.computed = 0
        self.compared = False

    @cached_property
    def table(self) -> Tensor:
        return self.make_table()

    @cached_property
    def filled(self) -> npt.NDArray[np.bool_]:
        """Return which (image, view) pairs the table holds."""
        return np.zeros(self.table.shape[:2], dtype=bool)

    @property
    def recorded_as(self) -> Hashable:
        """Its logits are an input of a recorded step."""
        return "cached"

    def __call__(self, batch: Batch) -> Tensor:
        found = next(self.prepared(iter([batch]))).teacher
        assert found is not None, "prepared looks it up"
        return found

    def prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches with their logits."""
        for batch in batches:
            coming = [batch]
            if missing := not self._known(batch).all():
                while sum(len(each.images) for each in coming) < self.together and (more := next(batches, None)):
                    coming.append(more)
                self._fill(coming)
            for each in coming:
                found = self._look_up(each)
                if not (missing or self.compared):
                    self._compare(found, _bounded(self.teacher(each)))
                yield each._replace(teacher=found)

    def _known(self, batch: Batch) -> npt.NDArray[np.bool_]:
        index, views = _numbers(batch)
        return self.filled[index.numpy(), views.numpy()]

    def _fill(self, batches: list[Batch]) -> None:
        """Compute the missing logits of the batches."""
        rows = [torch.from_numpy(np.flatnonzero(~self._known(batch))) for batch in batches]
        parts = [Batch(*_rows(batch, row)) for batch, row in zip(batches, rows, strict=True)]
        whole = Batch(*(torch.cat(part) for part in zip(*(part[:4] for part in parts), strict=True)))
        logits, place = self.teacher(whole), self.table.device
        index, views = _numbers(whole)
        here = (each.to(place, non_blocking=True) for each in (index, views))
        self.table[tuple(here)] = _bounded(logits).to(place, torch.float16)
        self.filled[index.numpy(), views.numpy()] = True
        self.computed += len(index)

    def _look_up(self, batch: Batch) -> Tensor:
        self.asked += len(batch.images)
        here = (each.to(self.table.device, non_blocking=True) for each in _numbers(batch))
        return self.table[tuple(here)].to(batch.images.device, non_blocking=True).float()

    def _compare(self, found: Tensor, live: Tensor) -> None:
        self.compared = True
        error = ((found - live).abs().max() / live.abs().max()).item()
        if not error < CACHE_TOLERANCE:
            raise InputError(
                f"the teacher's logits for the same views differ by {error:.0%}: it draws random numbers in eval mode; "
                "set teacher.cache=none"
            )


def _rows(batch: Batch, rows: Tensor) -> tuple[Tensor, ...]:
    """Return some rows of a batch: images, labels, index, views."""
    here, (index, views) = rows.to(batch.images.device, non_blocking=True), _numbers(batch)
    return batch.images[here], batch.labels[here], index[rows], views[rows]


def _numbers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the number of each image and of its view, (B,), on the CPU."""
    index, views = batch.index, batch.views
    assert index is not None and views is not None, "only batches whose views are numbered are cached"
    return index, views


def _bounded(logits: Tensor) -> Tensor:
    """Clamp the logits to the range of float16: infinite logits would make the loss NaN."""
    largest = torch.finfo(torch.float16).max
    return logits.clamp(-largest, largest)


def allocate(shape: tuple[int, int, int], device: torch.device, folder: Path) -> Tensor:
    """Allocate a float16 table for `LogitCache`, by its size: on the device, in host memory, or a nameless file in
    `folder`.
    """
    size = 2 * shape[0] * shape[1] * shape[2]
    if device.type == "cuda" and size <= SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=torch.float16, device=device)
    if size <= SHARE_OF_HOST * (memory_bytes(free=True) or 0) / local_ranks():  # each rank has a table
        return torch.empty(shape, dtype=torch.float16)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives its name
        _reserve(file.fileno(), size, folder)
        return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=shape))


def _reserve(file: int, size: int, folder: Path) -> None:
    """Take the space of a mapped file now: a disk that is full later would end the process by a signal.

    Raises OutOfSpaceError, with the bytes needed, if there is not enough.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in FULL:  # a file system without this function
            return
        raise OutOfSpaceError(
            f"no space left in {folder} for the teacher's logits of all views, {size:,} bytes: free some space, or set "
            "teacher.cache=none"
        ) from None
