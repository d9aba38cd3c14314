"""Preprocess a picture for a network, outside of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from repan_cli.config.conventions import CENTER, CROP_SHARE, INTERPOLATION
from repan_cli.data import image_files


@dataclass(frozen=True)
class MiddleCrop:
    """The part of a large picture that is used outside of training, as in timm.

    Attributes:
        share: the share of the resized picture's side that is kept.
        mode: one of `CROP_MODES`.
        fill: the color of a border, each channel from 0 to 1.
    """

    share: float = CROP_SHARE
    mode: str = CENTER
    interpolation: str = INTERPOLATION
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)

    def transform(self, size: int) -> transforms.Compose:
        """Return the steps from a picture to a uint8 tensor (C, size, size)."""
        whole = timm.data.create_transform(
            size,
            is_training=False,
            use_prefetcher=True,  # so that timm leaves out the normalization
            interpolation=self.interpolation,
            mean=self.fill,  # the color of a border
            crop_pct=self.share,
            crop_mode=self.mode,
        )
        return transforms.Compose([*whole.transforms[:-1], functional.pil_to_tensor])


@dataclass(frozen=True)
class Preparation:
    """Side, channels and normalization of a network's images.

    With `resized`, pictures are resized and cropped by `crop`. Otherwise they are cropped to a square and resized.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: bool
    crop: MiddleCrop = MiddleCrop()

    def picture(self, image: Image.Image) -> Tensor:
        """Convert a picture to uint8 (C, H, W)."""
        if not self.resized:
            return functional.pil_to_tensor(image_files.square(image, self.size))
        return self.crop.transform(self.size)(image)

    def file(self, path: Path) -> Tensor:
        """Read the image in a file, (C, H, W), normalized. Raises UnreadableImageError, naming the file."""
        return self.normalized(self.picture(image_files.open_image(path, self.channels)))

    def normalized(self, image: Tensor) -> Tensor:
        """Convert uint8 (..., C, H, W) to float32: scale to [0, 1], subtract the mean, divide by std."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std
