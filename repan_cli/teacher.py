"""A teacher: a merged network in eval mode that sees the student's images its own way, and a cache of its logits.

It is no part of the model, so it enters neither the optimizer nor a checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.data.source import Batch
from repan_cli.errors import InputError
from repan_cli.runtime import Runtime

CACHE_TOLERANCE = 0.05
"""Largest difference, of the largest logit, between what a cache holds and what the teacher says now. Rounding, to
bfloat16 in batches put together otherwise, stays below a hundredth.
"""

SHARE_OF_DEVICE, SHARE_OF_HOST = 0.25, 0.5
"""How much of the free memory the cache may take before it moves to the next slower place."""


@dataclass(frozen=True)
class View:
    """How a network wants its images: the side in pixels, mean and std of each channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Teacher:
    """Logits of a network for batches that are normalised and sized for the student.

    Args:
        model: on the runtime's device; it is put in eval mode.
        own: how it wants its images.
        student: how the batches come.
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
        """(B, C, H, W) as the student sees them to float32 (B, num_classes)."""
        images = torch.addcmul(self.shift, images, self.scale)
        if self.size is not None:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        images = images.contiguous(memory_format=self.runtime.memory_format)
        with self.runtime.autocast():
            return self.model(images).float()

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits(batch.images)


class LogitCache:
    """A teacher's logits in float16 by (image, view), computed when a view is first seen.

    Exact for views that can be told by a number: crops and flips. A run that repeats the views of its first cycle
    (`cycle.reseed=same`) or that does not augment computes each of them once. The first batch that needs nothing new is
    computed all the same, and compared: a teacher that is not a function of the view alone raises InputError.

    Args:
        teacher: what is asked for views that are not there yet.
        make_table: called at the first use, for a float16 table (images, views, classes) in whatever memory.
    """

    def __init__(self, teacher: Callable[[Batch], Tensor], make_table: Callable[[], Tensor]) -> None:
        self.teacher, self.make_table = teacher, make_table
        self.asked = self.computed = 0
        self.compared = False

    @cached_property
    def table(self) -> Tensor:
        return self.make_table()

    @cached_property
    def filled(self) -> Tensor:
        """Which (image, view) the table knows."""
        return torch.zeros(self.table.shape[:2], dtype=torch.bool, device=self.table.device)

    def __call__(self, batch: Batch) -> Tensor:
        place = self.table.device
        index, views = batch.index.to(place), batch.views.to(place)
        missing = (~self.filled[index, views]).nonzero().squeeze(1)
        self.asked, self.computed = self.asked + len(index), self.computed + len(missing)
        if len(missing):
            here = missing.to(batch.images.device)
            logits = self.teacher(Batch(*(part[here] for part in batch)))
            self.table[index[missing], views[missing]] = _bounded(logits).to(place, torch.float16)
            self.filled[index[missing], views[missing]] = True
        found = self.table[index, views].to(batch.images.device).float()
        if not (len(missing) or self.compared):
            self._compare(found, _bounded(self.teacher(batch)))
        return found

    def _compare(self, found: Tensor, live: Tensor) -> None:
        self.compared = True
        error = ((found - live).abs().max() / live.abs().max()).item()
        if not error < CACHE_TOLERANCE:
            raise InputError(
                f"the teacher's logits for the same views differ by {error:.0%}: it draws random numbers in eval mode; "
                "set teacher.cache=none"
            )


def _bounded(logits: Tensor) -> Tensor:
    """Within what float16 holds: infinite logits would make the loss no number."""
    largest = torch.finfo(torch.float16).max
    return logits.clamp(-largest, largest)


def allocate(shape: tuple[int, int, int], device: torch.device, folder: Path) -> Tensor:
    """A float16 table for `LogitCache`, by its size: on the device, in host memory, or a nameless file in `folder`."""
    size = 2 * shape[0] * shape[1] * shape[2]
    if device.type == "cuda" and size <= SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=torch.float16, device=device)
    if size <= SHARE_OF_HOST * _free_host_memory():
        return torch.empty(shape, dtype=torch.float16)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives its name
        return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=shape))


def _free_host_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not told on this system
        return 0
