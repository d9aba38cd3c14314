"""The source of batches: what images in memory and images that are read one by one have in common.

An epoch is a plan: an order of the images, and for each a view (a crop and a flip) and the middle of a blank square,
all drawn from its position, (seed, cycle, epoch). Nothing depends on what ran before, so that a run can go on from any
step.
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
    """Normalised images (B, C, H, W), labels (B,) or their shares (B, num_classes); on the CPU, which image of the part
    and which view of it each one is; and the logits (B, num_classes) of a teacher, where they are known already.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # in place of tuple's method, which nobody calls
    views: Tensor | None = None
    teacher: Tensor | None = None

    def computed_on(self) -> tuple[Tensor, ...]:
        """Return the parts of the batch that the device needs, from which `Batch.of` rebuilds it."""
        return (self.images, self.labels) if self.teacher is None else (self.images, self.labels, self.teacher)

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Batch:
        images, labels, *teacher = parts
        return cls(images, labels, teacher=teacher[0] if teacher else None)

    def classes(self) -> Tensor:
        """Return the class with the largest share, (B,)."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)


class EpochPlan(NamedTuple):
    """The order (N,) of the images in an epoch; by the image's own index its view (N,), the middle (N,), `row * size +
    column`, of its blank square, and five numbers in [0, 1) (N, 5) for the rectangle that is erased.
    """

    order: Tensor
    views: Tensor
    holes: Tensor
    erased: Tensor


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images.

    `padding`: zero pixels around each image that a crop may reach into; `flip`: whether views may be mirrored;
    `policy`: name of a policy, see `policies.py`. `cutout`: side of a square that is blanked (DeVries & Taylor 2017);
    `erase`: the share of images in which a rectangle is (Zhong et al. 2017). `mixup` (Zhang et al. 2017) and `cutmix`
    (Yun et al. 2019): their alpha. `least_area`: of the image, where a part of it is cropped and resized. Zeros and
    None are off.
    """

    padding: int = 0
    flip: bool = False
    policy: str | None = None
    cutout: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    least_area: float = 0.08

    @property
    def unnumbered(self) -> str | None:
        """The setting by which the views of an image are more than its crops and flips; None when they are not."""
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
        count, size, channels: of the images.
        mean, std: of each channel, for images in [0, 1].
        classes: how many there are, for labels that are shares of several.
        memory_format: of the batches, channels last or contiguous.
        rank, ranks: this process and how many there are: of each training batch it has a contiguous part, of the
            batches that are looked at every `ranks`th.
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
        self.stop: Callable[[], bool] = bool  # asked while a batch is waited for
        self.first: Callable[[Batch], None] | None = None  # is shown the next training batch, once

    @property
    def unnumbered(self) -> str | None:
        """Return why the views of an image cannot be numbered; None when they can."""
        return self.augmentation.unnumbered

    @property
    def view_count(self) -> int:
        """Count the crops and flips of an image."""
        return 2 * self.side**2

    def training_batches(self, batch_size: int, *position: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of the epoch at `position`, (seed, cycle, epoch), from number `first` on."""
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
        """Yield a batch of cropped, flipped, normalised images for each of `rows`, which hold their indices."""

    def check_room(self, batch_size: int) -> None:  # noqa: B027 (most take none)
        """Raise InputError if the shared memory is too small for such batches on all ranks."""

    def steps(self, batch_size: int) -> int:
        """Return the number of batches in a training epoch. A last batch of one image a rank is dropped: BN cannot
        train on it.
        """
        full, rest = divmod(self.count, batch_size)
        return full + (rest >= 2 * self.ranks)

    def alone(self) -> Loader:
        """Return a loader of all the same images for one process."""
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
        """Apply the augmentation of whole batches: blank squares and rectangles, and mixing."""
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
    """Return mixup or CutMix for each batch, or a choice of the two where both are on."""
    ways = []
    if augmentation.mixup:
        ways.append(v2.MixUp(alpha=float(augmentation.mixup), num_classes=classes))
    if augmentation.cutmix:
        ways.append(v2.CutMix(alpha=float(augmentation.cutmix), num_classes=classes))
    return v2.RandomChoice(ways) if ways else None


def _squares(holes: Tensor, side: int, size: int) -> Tensor:
    """Return squares around `holes` as (B, 4): first and last row, first and last column, exclusive; some reach
    outside.
    """
    rows, columns = (middle - side // 2 for middle in (holes // size, holes % size))
    return torch.stack([rows, rows + side, columns, columns + side], dim=1)


def _rectangles(numbers: Tensor, share: float, size: int) -> Tensor:
    """Return rectangles (B, 4) like `_squares`: in a `share` of the images, 2 to 33 % of the area, 0.3 to 3.3 times as
    high as wide.
    """
    chosen, area, shape, row, column = numbers.unbind(1)
    pixels = (0.02 + area * (1 / 3 - 0.02)) * size**2
    ratio = torch.exp((2 * shape - 1) * math.log(3.3))
    height, width = (side.sqrt().round().clamp(1, size) * (chosen < share) for side in (pixels * ratio, pixels / ratio))
    top, left = (place * (size + 1 - side) for place, side in ((row, height), (column, width)))
    return torch.stack([top.floor(), top.floor() + height, left.floor(), left.floor() + width], dim=1)


def _blank(images: Tensor, boxes: Tensor) -> Tensor:
    """Return images (B, C, H, W) with boxes (B, 4) set to the mean, zero."""
    axis = torch.arange(images.shape[-1], device=images.device)
    first_row, last_row, first_column, last_column = boxes.unsqueeze(2).unbind(1)
    rows, columns = (first_row <= axis) & (axis < last_row), (first_column <= axis) & (axis < last_column)
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)
