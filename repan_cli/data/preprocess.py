"""How a picture becomes what a network reads, outside of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from repan_cli.data import image_files
from repan_cli.data.types import ReadOptions

CROP_SHARE = 0.875
"""Side of the part that is looked at, of the resized picture."""


@dataclass(frozen=True)
class Preparation:
    """Side, channels and normalisation of a network's images.

    `resized`: of large pictures the shorter side is resized and the middle taken, `share` of it; small ones are cropped
    to a square and resized.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: bool
    share: float = CROP_SHARE

    @staticmethod
    def crops(crop: str, size: int) -> bool:
        """Tell whether the setting `data.crop` means that images of this side are resized."""
        return ReadOptions(crop=crop).streams(size)

    def picture(self, image: Image.Image) -> Tensor:
        """(C, H, W) in uint8."""
        if not self.resized:
            return functional.pil_to_tensor(image_files.square(image, self.size))
        return middle(self.size, self.share)(image)

    def file(self, path: Path) -> Tensor:
        """The image in a file, (C, H, W) normalised. Raises UnreadableImageError naming it."""
        return self.normalized(self.picture(image_files.open_image(path, self.channels)))

    def normalized(self, image: Tensor) -> Tensor:
        """uint8 (..., C, H, W) to float32, values from 0 to 1 less the mean, over std."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std


def middle(size: int, share: float = CROP_SHARE) -> transforms.Compose:
    """A picture resized, bicubic, its middle taken, as a uint8 tensor."""
    resize = transforms.Resize(round(size / share), transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), functional.pil_to_tensor])
