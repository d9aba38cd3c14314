"""Keep images on the device as uint8, and gather, crop, flip and normalize batches there, with one view per image.

A view of an image is a crop position and a flip. Its number is `(row * side + column) * 2 + flip`, with side = 2 *
padding + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repan_cli.data.batches import Batch, EpochPlan, Loader
from repan_cli.data.types import ArrayImages


class InMemoryLoader(Loader):
    """The images of one part of a data set on a device.

    Args:
        part: uint8 images (N, H, W, C) and labels (N,).
        **options: as for `Loader`, but without a policy.
    """

    def __init__(self, part: ArrayImages, **options: Any) -> None:
        count, size = part.images.shape[:2]
        super().__init__(count=count, size=size, **options)
        assert self.augmentation.policy is None, "a policy is for images that are read one by one"
        images = torch.from_numpy(part.images).to(self.device)
        self.labels = torch.from_numpy(part.labels).to(self.device)
        padding = self.augmentation.padding
        self.windows = self._windows(F.pad(images, (0, 0, padding, padding, padding, padding)))

    def _windows(self, padded: Tensor) -> Tensor:
        """Return all crops as a view of the padded images, (N, side, side, H, W, C), without copying."""
        image, row, pixel, channel = padded.stride()
        shape = (self.count, self.side, self.side, self.size, self.size, self.channels)
        return padded.as_strided(shape, (image, row, pixel, row, pixel, channel))

    @property
    def center(self) -> int:
        """The number of the view that is the image itself."""
        padding = self.augmentation.padding
        return (padding * self.side + padding) * 2

    def _places(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row and the column of the crop of each view, and whether it is mirrored."""
        crop = views // 2
        return crop // self.side, crop % self.side, (views % 2).bool()

    def _cut(self, index: Tensor, row: Tensor, column: Tensor, mirrored: Tensor) -> Tensor:
        batch = self.windows[index, row, column]
        if self.augmentation.flip:
            batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(2), batch)
        normalized = torch.addcmul(self.shift, batch.float(), self.scale)
        return normalized.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def batch(self, index: Tensor, views: Tensor) -> Batch:
        """Return the given views of the given images, with their labels."""
        return next(self._gathered(index, views, [len(index)]))

    def _gathered(self, order: Tensor, views: Tensor, sizes: list[int]) -> Iterator[Batch]:
        """Yield batches of the given sizes.

        All numbers go to the device in one transfer, since each is a host-device sync.
        """
        here = order.to(self.device)
        parts = (order, views, here, *self._places(views.to(self.device)))
        for index, view, rows, *place in zip(*(part.split(sizes) for part in parts), strict=True):
            yield Batch(self._cut(rows, *place), self.labels[rows], index, view)

    def _training(self, rows: Sequence[Tensor], plan: EpochPlan, position: tuple[int, ...]) -> Iterator[Batch]:
        order = torch.cat([*rows, torch.empty(0, dtype=torch.long)])
        return self._gathered(order, plan.views[order], [len(row) for row in rows])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        rows = torch.arange(self.count).split(batch_size)[self.rank :: self.ranks]
        order = torch.cat([*rows, torch.empty(0, dtype=torch.long)])
        return self._gathered(order, torch.full_like(order, self.center), [len(row) for row in rows])
