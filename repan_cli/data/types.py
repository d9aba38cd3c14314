"""Define a data set's specification and its parts, with images in memory or read lazily."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from repan_cli.config.conventions import is_resized
from repan_cli.errors import InputError
from repan_cli.registry import Registry

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SHORT = 16
"""The number of digits of a digest that is no protection, but tells sets of images apart."""

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


Names = npt.NDArray[np.bytes_]


class ArrayImages(NamedTuple):
    """Images as uint8 (N, H, W, C) and their class numbers as int64 (N,).

    `names` (N,) holds the names of their files relative to the folder of the part; None if they have none.
    """

    images: Pixels
    labels: Labels
    names: Names | None = None

    def take(self, chosen: Mask) -> ArrayImages:
        """Return the images that a mask (N,) chooses."""
        names = None if self.names is None else self.names[chosen]
        return ArrayImages(self.images[chosen], self.labels[chosen], names)


class Reader(Protocol):
    """Opens one of many pictures by number. It must be picklable, for worker processes."""

    def __call__(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    def names(self, index: npt.NDArray[np.int64]) -> Iterable[bytes] | None:
        """Return names by which images are recognized wherever their data are; None if they have none."""


@dataclass(frozen=True)
class LazyImages:
    """Images that are read on access: image `index[i]` of the reader, of class `labels[i]`.

    `left_out` holds the names, relative to the root, of files that are not among them because they cannot be read.
    """

    read: Reader
    labels: Labels
    index: npt.NDArray[np.int64]
    left_out: tuple[str, ...] = ()

    def take(self, chosen: Mask) -> LazyImages:
        """Return the pictures that a mask (N,) chooses."""
        return LazyImages(self.read, self.labels[chosen], self.index[chosen], self.left_out)


Part = ArrayImages | LazyImages


def digest_of_names(part: Part) -> str | None:
    """Return the SHA-256 of the names of a part's images, in order; None if they have none.

    Systems that compose accents differently, or separate folders by another sign, give the same digest.
    """
    names = part.names if isinstance(part, ArrayImages) else part.read.names(part.index)
    if names is None:
        return None
    total = hashlib.sha256()
    for name in names:
        total.update(_portable(name) + b"\0")
    return total.hexdigest()


def _portable(name: bytes) -> bytes:
    if os.sep != "/":
        name = name.replace(os.fsencode(os.sep), b"/")
    if name.isascii():
        return name
    try:
        return unicodedata.normalize("NFC", name.decode()).encode()
    except UnicodeDecodeError:
        return name


class RawDataset(NamedTuple):
    """Classes and parts as they were read. `image_size` is the side for images that have no common size."""

    classes: tuple[str, ...]
    parts: dict[str, Part]
    image_size: int | None = None


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading images.

    Attributes:
        image_size: the side in pixels; None keeps the images' own, else takes `network_size`.
        channels: 1 or 3.
        crop: as the setting `data.crop`.
        skip: leave out training images that cannot be read.
        left_out: the names, relative to the root, of images that are left out of the training part, whose loader skips
            others that cannot be read; None leaves out those that cannot be read now.
        classes: the number of classes of synthetic data.
        download: fetch a missing set. If false, no folder is made either.
        order: the order of the classes of image folders: as the setting `data.class_order`, or a list of names.
        only: the one part of image folders to read; None reads all.
        network_size: the side of the network's images, for image folders without a common size.
    """

    image_size: int | None = None
    channels: int = 3
    crop: str = "auto"
    skip: bool = False
    left_out: tuple[str, ...] | None = None
    classes: int = 10
    download: bool = True
    order: str | tuple[str, ...] = "text"
    only: str | None = None
    network_size: int | None = None

    def streams(self, size: int) -> bool:
        """Return whether images of this side are read one by one, cropped and resized; otherwise they are kept in
        memory.
        """
        return is_resized(self.crop, size)


@dataclass(frozen=True)
class DatasetSpec:
    """Everything that is known about a data set before it is read.

    Attributes:
        text: a description for lists.
        load: a function of the root folder and the `ReadOptions` that reads the data set.
        mean, std: one value per channel, of the training images in [0, 1].
        flip: false if a mirrored image would mean something else, such as a digit.
        policy: the AutoAugment policy that was found for the data.
        image_size: the side of the images; None if they have no common size.
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
    """A data set ready for training. `val` is None if nothing was held out."""

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
    def parts(self) -> dict[str, Part]:
        """Return the parts that there are, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    @cached_property
    def labels_digest(self) -> str:
        """SHA-256 of the labels of all parts, in order."""
        return hashlib.sha256(b"|".join(part.labels.tobytes() for part in self.parts.values())).hexdigest()

    @cached_property
    def names_digests(self) -> dict[str, str]:
        """Short digests of the names of the images of each part, in order, for parts whose images have names."""
        found = {name: digest_of_names(part) for name, part in self.parts.items()}
        return {name: digest[:SHORT] for name, digest in found.items() if digest is not None}

    def digest_of(self, part: str) -> str:
        """Return a short digest of the labels of a part and, if they are known, of the names of its images."""
        content = self.parts[part].labels.tobytes() + self.names_digests.get(part, "").encode()
        return hashlib.sha256(content).hexdigest()[:SHORT]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def part(self, name: str) -> Part:
        """Return the part called train, val or test. Raises InputError if there is no validation part."""
        images: Part | None = getattr(self, name)
        if images is None:
            raise InputError(
                f"{self.name} has no validation part: it was trained with data.val_fraction=0; use --split test"
            )
        return images


DATASETS: Registry[DatasetSpec] = Registry("data set")
PREFIXES: dict[str, Callable[[str], DatasetSpec]] = {}
"""Functions that make the specification of a name such as `hfds/...`, by the part before the slash."""
