"""The parts of a data set: its specification, its parts, images in memory and images that are read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from repan_cli.config.conventions import is_resized
from repan_cli.errors import InputError
from repan_cli.registry import Registry

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class ArrayImages(NamedTuple):
    """Images as uint8 (N, H, W, C) and their class numbers as int64 (N,)."""

    images: Pixels
    labels: Labels

    def take(self, chosen: Mask) -> ArrayImages:
        """Return the images that a mask (N,) chooses."""
        return ArrayImages(self.images[chosen], self.labels[chosen])


class Reader(Protocol):
    """Opens one picture of many, by number; picklable, for the processes that load."""

    def __call__(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class LazyImages:
    """Images that are read on access: image `index[i]` of the reader, of class `labels[i]`."""

    read: Reader
    labels: Labels
    index: npt.NDArray[np.int64]

    def take(self, chosen: Mask) -> LazyImages:
        """Return the pictures that a mask (N,) chooses."""
        return LazyImages(self.read, self.labels[chosen], self.index[chosen])


Part = ArrayImages | LazyImages


class RawDataset(NamedTuple):
    """Classes and parts as they were read; `image_size` is the side that images without one of their own get."""

    classes: tuple[str, ...]
    parts: dict[str, Part]
    image_size: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """The way in which images are to be read.

    `image_size` None is their own, else `network_size`, that of the network; `channels` 1 or 3; `crop` as the
    setting `data.crop`; `skip` leaves out training images that cannot be read, `keep` leaves that to the loader;
    `classes` is the number of those of synthetic data. With `download` false nothing is fetched and no folder is
    made. `order` is that of the classes of image folders, as the setting `data.class_order`, or a list of them;
    `only` names the one part of image folders that is to be read.
    """

    image_size: int | None = None
    channels: int = 3
    crop: str = "auto"
    skip: bool = False
    keep: bool = False
    classes: int = 10
    download: bool = True
    order: str | tuple[str, ...] = "text"
    only: str | None = None
    network_size: int | None = None

    def streams(self, size: int) -> bool:
        """Return whether images of this side are read one by one, a part of each resized; others live in memory."""
        return is_resized(self.crop, size)


@dataclass(frozen=True)
class DatasetSpec:
    """All that is known of a data set before it is read.

    `load(root, reading)` reads it. Mean and std are those of the training images in [0, 1]. `flip` is False where a
    mirrored image is another thing, such as a digit. `policy` names the AutoAugment policy that was found for it;
    `image_size` is None where images have one of their own.
    """

    text: str
    load: Callable[[Path, ReadOptions], RawDataset]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    policy: str = "imagenet"
    image_size: int | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training. `val` is None when nothing was held out."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    policy: str
    image_size: int
    train: Part
    val: Part | None
    test: Part
    split_digest: str

    @property
    def labels_digest(self) -> str:
        """SHA-256 over the labels of all parts, in order."""
        parts = (part.labels.tobytes() for part in (self.train, self.val, self.test) if part is not None)
        return hashlib.sha256(b"|".join(parts)).hexdigest()

    @property
    def channels(self) -> int:
        return len(self.mean)

    def part(self, name: str) -> Part:
        """Return the part called train, val or test. Raises InputError when there is no validation part."""
        images: Part | None = getattr(self, name)
        if images is None:
            raise InputError(
                f"{self.name} has no validation part: it was trained with data.val_fraction=0; use --split test"
            )
        return images


DATASETS: Registry[DatasetSpec] = Registry("data set")
PREFIXES: dict[str, Callable[[str], DatasetSpec]] = {}
"""Makers of the specifications of names like `hfds/...`, by what stands before the slash."""
