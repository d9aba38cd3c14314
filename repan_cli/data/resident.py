"""Images that live on the device as uint8; batches are gathered, cropped, flipped and normalised there, a view a
sample.

A view of an image is a crop position and a flip, numbered `(row * side + column) * 2 + flip` with side = 2 * padding
+ 1; cutout blanks a square of it. An epoch is a plan: an order of the images, and for each a view and the middle of its
square, drawn from (seed, cycle, epoch).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from repan_cli import runtime
from repan_cli.data.datasets import Images


class Batch(NamedTuple):
    """Normalised images (B, C, H, W), labels (B,), and which image of the part and which view of it each one is."""

    images: Tensor
    labels: Tensor
    index: Tensor
    views: Tensor


class Plan(NamedTuple):
    """The order (N,) of the images in an epoch; the view (N,) and the middle (N,), `row * size + column`, of the blank
    square of each image, by its own index.
    """

    order: Tensor
    views: Tensor
    holes: Tensor


class ResidentImages:
    """The images of one part of a data set on a device.

    Args:
        part: uint8 images (N, H, W, C) and labels (N,).
        mean, std: of each channel, for images in [0, 1].
        memory_format: of the batches, channels last or contiguous.
        padding: zero pixels around each image that a crop may reach into.
        flip: whether views may be mirrored.
        cutout: side of a square of each training image that is blanked (DeVries & Taylor 2017); 0 is none.
    """

    def __init__(
        self,
        part: Images,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
        padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
    ) -> None:
        images = torch.from_numpy(part.images).to(device)
        self.count, self.size, _, self.channels = images.shape
        self.padding, self.flip, self.memory_format = padding, flip, memory_format
        self.side, self.cutout = 2 * padding + 1, cutout
        self.labels = torch.from_numpy(part.labels).to(device)
        self.windows = self._windows(F.pad(images, (0, 0, padding, padding, padding, padding)))
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)

    def _windows(self, padded: Tensor) -> Tensor:
        """All crops as a view of the padded images: (N, side, side, H, W, C), nothing copied."""
        image, row, pixel, channel = padded.stride()
        shape = (self.count, self.side, self.side, self.size, self.size, self.channels)
        return padded.as_strided(shape, (image, row, pixel, row, pixel, channel))

    @property
    def view_count(self) -> int:
        """How many views an image has; with cutout the blank square is no part of their number."""
        return 2 * self.side**2

    @property
    def center(self) -> int:
        """The view that is the image itself."""
        return (self.padding * self.side + self.padding) * 2

    def gather(self, index: Tensor, views: Tensor) -> Tensor:
        """The given views of the given images, float32 (B, C, H, W), normalised."""
        crop, mirrored = views // 2, (views % 2).bool()
        batch = self.windows[index, crop // self.side, crop % self.side]
        if self.flip:
            batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(2), batch)
        normalised = torch.addcmul(self.shift, batch.float(), self.scale)
        return normalised.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def plan(self, *position: int) -> Plan:
        """The order and views of the epoch at `position`, (seed, cycle, epoch)."""
        draw = runtime.generator("epoch", *position)
        order = torch.randperm(self.count, generator=draw)
        crops = torch.randint(self.side**2, (self.count,), generator=draw)
        flips = torch.randint(2, (self.count,), generator=draw) * self.flip
        holes = torch.randint(self.size**2, (self.count,), generator=draw)
        return Plan(order, crops * 2 + flips, holes)

    def blank(self, images: Tensor, holes: Tensor) -> Tensor:
        """Images (B, C, H, W) with a square around `holes` (B,) at the mean, zero; at the border a part of it."""
        axis = torch.arange(self.size, device=images.device)
        first = -(self.cutout // 2)
        rows, columns = (axis - middle.view(-1, 1) for middle in (holes // self.size, holes % self.size))
        inside = [(first <= offset) & (offset < first + self.cutout) for offset in (rows, columns)]
        return images.masked_fill((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), 0)

    def steps(self, batch_size: int) -> int:
        """Batches of a training epoch. A last batch of a single image is left out: BN cannot train on it."""
        full, rest = divmod(self.count, batch_size)
        return full + (rest > 1)

    def batch(self, index: Tensor, views: Tensor) -> Batch:
        """The given views of the given images, with their labels."""
        return Batch(self.gather(index, views), self.labels[index], index, views)

    def training_batches(self, batch_size: int, *position: int) -> Iterator[Batch]:
        """The batches of the epoch at `position`."""
        plan = Plan(*(part.to(self.labels.device) for part in self.plan(*position)))
        for step in range(self.steps(batch_size)):
            index = plan.order[step * batch_size : (step + 1) * batch_size]
            batch = self.batch(index, plan.views[index])
            yield batch._replace(images=self.blank(batch.images, plan.holes[index])) if self.cutout else batch

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order and unchanged."""
        for index in torch.arange(self.count, device=self.labels.device).split(batch_size):
            yield self.batch(index, torch.full_like(index, self.center))
