"""Define what loaders have in common, for images in memory and for images that are read one by one.

An epoch is a plan: the order of its images, and for each image a view (a crop and a flip) and the center of a blank
square. All are drawn from the epoch's position, (seed, cycle, epoch). Nothing depends on what ran before, so a run can
continue from any step.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from repan_cli.system.seeding import generator_for, seed_for


class Batch(NamedTuple):
    """One batch of a loader.

    Attributes:
        images: normalized images (B, C, H, W).
        labels: class numbers (B,), or the shares of each class (B, num_classes).
        index: the image's number in its part (B,), on the CPU.
        views: the number of the image's view (B,), on the CPU.
        teacher: a teacher's logits (B, num_classes), if they are known already.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # in place of tuple's method, which nobody calls
    views: Tensor | None = None
    teacher: Tensor | None = None

    def computed_on(self) -> tuple[Tensor, ...]:
        """Return the tensors of the batch that the device needs; `Batch.of` makes a batch of them."""
        return (self.images, self.labels) if self.teacher is None else (self.images, self.labels, self.teacher)

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Batch:
        images, labels, *teacher = parts
        return cls(images, labels, teacher=teacher[0] if teacher else None)

    def classes(self) -> Tensor:
        """Return the class with the largest share, (B,)."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)


class EpochPlan(NamedTuple):
    """The plan of an epoch. All but `order` are indexed by an image's number in its part.

    Attributes:
        order: the order of the images (N,).
        views: the number of each image's view (N,).
        holes: the center of its blank square (N,), as `row * size + column`.
        erased: five numbers in [0, 1) (N, 5), from which the erased rectangle is computed; (0, 5) without erasing.
    """

    order: Tensor
    views: Tensor
    holes: Tensor
    erased: Tensor


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images. Zero and None mean off.

    Attributes:
        padding: the width in pixels of a border of zeros that crops may reach into.
        flip: whether views may be mirrored.
        policy: the name of a policy, see `policies.py`.
        cutout: the side in pixels of a square that is blanked (DeVries & Taylor 2017).
        erase: the share of images in which a rectangle is blanked (Zhong et al. 2017).
        mixup: alpha of mixup (Zhang et al. 2017).
        cutmix: alpha of CutMix (Yun et al. 2019).
        least_area: the smallest share of an image's area that a crop may have, for images that are cropped and resized.
        random_crop: false prepares such images as for scoring, by a crop in the middle.
    """

    padding: int = 0
    flip: bool = False
    policy: str | None = None
    cutout: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    least_area: float = 0.08
    random_crop: bool = True

    @property
    def unnumbered(self) -> str | None:
        """The setting that makes more views of an image than its crops and flips; None if there is none."""
        named = {
            f"data.augment={self.policy}": self.policy,
            f"data.cutout={self.cutout}": self.cutout,
            f"data.erase={self.erase:g}": self.erase,
            f"data.mixup={self.mixup:g}": self.mixup,
            f"data.cutmix={self.cutmix:g}": self.cutmix,
        }
        return next((name for name, value in named.items() if value), None)


NONE = Augmentation()


class Loader(ABC):
    """The images of one part of a data set, in batches on a device.

    Args:
        count, size: the number of images, and their side in pixels.
        mean, std: one value per channel, for images in [0, 1].
        device: the device of the batches.
        memory_format: the memory format of the batches, channels last or contiguous.
        augmentation: the augmentation of training batches.
        classes: the number of classes; needed if labels are mixed.
        rank, ranks: the number of this process, and of all processes. A process gets a contiguous slice of each
            training batch, and every `ranks`-th batch for scoring.
    """

    def __init__(
        self,
        *,
        count: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
        augmentation: Augmentation = NONE,
        classes: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.count, self.size, self.channels, self.classes = count, size, len(mean), classes
        self.device, self.memory_format, self.augmentation = device, memory_format, augmentation
        self.side = 2 * augmentation.padding + 1
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        self.mix = _mix(augmentation, classes)
        self.stop: Callable[[], bool] = bool  # asked while waiting for a batch
        self.first: Callable[[Batch], None] | None = None  # gets the next training batch, once

    @property
    def unnumbered(self) -> str | None:
        """Return why the views of an image cannot be numbered; None when they can."""
        return self.augmentation.unnumbered

    @property
    def view_count(self) -> int:
        """Return the number of crops and flips of an image."""
        return 2 * self.side**2

    def training_batches(self, batch_size: int, *position: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of the epoch at `position`, (seed, cycle, epoch), starting with batch number `first`."""
        plan = self.plan(*position)
        rows = [row.tensor_split(self.ranks)[self.rank] for row in plan.order.split(batch_size)]
        rows = rows[: self.steps(batch_size)]
        for step, batch in enumerate(self._training(rows[first:], plan, position), start=first):
            batch = self._finished(batch, plan, (*position, step))
            if self.first is not None:
                look, self.first = self.first, None
                look(batch)
            yield batch

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all images of this rank once, in order and unchanged."""

    @abstractmethod
    def _training(self, rows: Sequence[Tensor], plan: EpochPlan, position: tuple[int, ...]) -> Iterator[Batch]:
        """Yield a batch of cropped, flipped, normalized images for each entry of `rows`, which hold image numbers."""

    def check_room(self, batch_size: int) -> None:  # noqa: B027 (most take none)
        """Raise InputError if the shared memory is too small for batches of this size on all ranks."""

    def steps(self, batch_size: int) -> int:
        """Return the number of batches in a training epoch.

        A last batch of one image per rank is dropped, because BN cannot train on it.
        """
        full, rest = divmod(self.count, batch_size)
        return full + (rest >= 2 * self.ranks)

    def alone(self) -> Loader:
        """Return a loader of the same images for a single process."""
        whole = copy.copy(self)
        whole.rank, whole.ranks = 0, 1
        return whole

    def plan(self, *position: int) -> EpochPlan:
        """Return the plan of the epoch at `position`, (seed, cycle, epoch), on the CPU."""
        draw = generator_for("epoch", *position)
        order = torch.randperm(self.count, generator=draw)
        crops = torch.randint(self.side**2, (self.count,), generator=draw)
        flips = torch.randint(2, (self.count,), generator=draw) * self.augmentation.flip
        holes = torch.randint(self.size**2, (self.count,), generator=draw)
        erased = torch.rand((self.count if self.augmentation.erase else 0, 5), generator=draw)
        return EpochPlan(order, crops * 2 + flips, holes, erased)

    def _finished(self, batch: Batch, plan: EpochPlan, position: tuple[int, ...]) -> Batch:
        """Apply the augmentation of whole batches: blank squares, blank rectangles, and mixing."""
        images, labels = batch.images, batch.labels
        if self.augmentation.cutout:
            holes = plan.holes[batch.index].to(self.device, non_blocking=True)
            images = _blank(images, _squares(holes, self.augmentation.cutout, self.size))
        if self.augmentation.erase:
            numbers = plan.erased[batch.index].to(self.device, non_blocking=True)
            images = _blank(images, _rectangles(numbers, self.augmentation.erase, self.size))
        if self.mix is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_for("mix", *position))
                images, labels = self.mix(images, labels)
            images = images.contiguous(memory_format=self.memory_format)
        return batch._replace(images=images, labels=labels)


def _mix(augmentation: Augmentation, classes: int) -> v2.Transform | None:
    """Return mixup or CutMix, or a random choice of the two per batch if both are on."""
    ways = []
    if augmentation.mixup:
        ways.append(v2.MixUp(alpha=float(augmentation.mixup), num_classes=classes))
    if augmentation.cutmix:
        ways.append(v2.CutMix(alpha=float(augmentation.cutmix), num_classes=classes))
    return v2.RandomChoice(ways) if ways else None


def _squares(holes: Tensor, side: int, size: int) -> Tensor:
    """Return the squares around `holes` as (B, 4): first and last row, first and last column. The last ones are
    exclusive.

    A square may reach outside the image.
    """
    rows, columns = (middle - side // 2 for middle in (holes // size, holes % size))
    return torch.stack([rows, rows + side, columns, columns + side], dim=1)


def _rectangles(numbers: Tensor, share: float, size: int) -> Tensor:
    """Return rectangles (B, 4) as `_squares` does; they are empty except in a `share` of the images.

    Each covers 2 to 33 % of the area, and is 0.3 to 3.3 times as high as wide.
    """
    chosen, area, shape, row, column = numbers.unbind(1)
    pixels = (0.02 + area * (1 / 3 - 0.02)) * size**2
    ratio = torch.exp((2 * shape - 1) * math.log(3.3))
    height, width = (side.sqrt().round().clamp(1, size) * (chosen < share) for side in (pixels * ratio, pixels / ratio))
    top, left = (place * (size + 1 - side) for place, side in ((row, height), (column, width)))
    return torch.stack([top.floor(), top.floor() + height, left.floor(), left.floor() + width], dim=1)


def _blank(images: Tensor, boxes: Tensor) -> Tensor:
    """Return images (B, C, H, W) with the boxes (B, 4) set to zero, the mean."""
    axis = torch.arange(images.shape[-1], device=images.device)
    first_row, last_row, first_column, last_column = boxes.unsqueeze(2).unbind(1)
    rows, columns = (first_row <= axis) & (axis < last_row), (first_column <= axis) & (axis < last_column)
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)
