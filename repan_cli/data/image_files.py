"""Image files: finding them in class folders, opening them, and bringing them to one mode and size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from repan_cli.errors import InputError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
PARTS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
"""Under which folder names each part of a set is looked for."""

MODES = {1: "L", 3: "RGB"}
NUMBERS = {"F": "floats", "I": "32-bit integers"}
"""Modes of images that hold no brightness, and what they hold."""


class UnreadableImageError(InputError):
    """An image that cannot be decoded; `data.on_error=skip` leaves it out of training."""


# ---------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file, its header read. What is wrong with it is an UnreadableImageError that names the file."""
    try:
        if not path.is_file():
            raise ValueError("there is no file" if not path.exists() else "it is no regular file")
        with Image.open(path) as image:
            if image.mode in NUMBERS:
                raise ValueError(f"its pixels are {NUMBERS[image.mode]}, not brightness from 0 to 255")
            yield image
    except UnidentifiedImageError:
        why = "it is no image, or cut off" if path.stat().st_size else "it is empty"
        raise UnreadableImageError(f"cannot read the image {path}: {why}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"cannot read the image {path}: {error}") from None


def check(path: Path, *, whole: bool) -> None:
    """Raise UnreadableImageError for a file that does not begin like an image; `whole`: that cannot be decoded."""
    with _opened(path) as image:
        if whole:
            image.draft("RGB", (image.width // 8, image.height // 8))  # JPEGs: as small as they can be
            image.load()


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """The upright picture in a file, RGB or grey, with 8 bits a channel.

    16-bit images keep their upper 8 bits; palettes, CMYK and transparency are converted as Pillow does. Raises
    UnreadableImageError, naming the file, for anything else.
    """
    with _opened(path) as image:
        return as_mode(ImageOps.exif_transpose(image), channels)


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """Bring an image to 8 bits in each of 1 or 3 channels."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(MODES[channels])


def square(image: Image.Image, size: int) -> Image.Image:
    """Cropped to a square and resized: whole-number reductions average pixels, others are bicubic with antialiasing."""
    if image.size == (size, size):
        return image
    whole = image.width % size == 0 and image.height % size == 0
    return ImageOps.fit(image, (size, size), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC)


def own_size(path: Path, channels: int) -> int:
    """The side of a square picture. Raises InputError for one that is not square."""
    image = open_image(path, channels)
    if image.width != image.height:
        raise InputError(
            f"{path} is {image.width}x{image.height} pixels: set data.image_size, images are cropped to a square"
        )
    return image.width


class FileReader:
    """Reads the pictures of a list of files, by number."""

    def __init__(self, paths: list[Path], channels: int) -> None:
        self.paths, self.channels = paths, channels

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.paths[index], self.channels)

    def name(self, index: int) -> str:
        return str(self.paths[index])


class ArrayReader:
    """Makes pictures of the images (N, H, W, C) in memory, by number."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self.images = images

    def __call__(self, index: int) -> Image.Image:
        return as_picture(self.images[index])

    def name(self, index: int) -> str:
        return f"image {index}"


def as_picture(image: npt.NDArray[np.uint8]) -> Image.Image:
    """(H, W, C) with 1 or 3 channels, uint8."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


# ---------------------------------------------------------------------------------------------- class folders


def part_folders(root: Path) -> dict[str, Path]:
    """The folders of the parts that a set has. Raises InputError without a training set or anything to report on."""
    found = {}
    for part, names in PARTS.items():
        there = [root / name for name in names if (root / name).is_dir()]
        if len(there) > 1:
            raise InputError(f"{there[0]} and {there[1]} are the same part of a data set: keep one of them")
        if there:
            found[part] = there[0]
    if "train" not in found:
        raise InputError(
            f"no folder {root / 'train'}: expected {root}/train/<class>/* and {root}/test/<class>/* (or val); "
            "--data-root names another place"
        )
    if len(found) == 1:
        raise InputError(f"neither {root / 'val'} nor {root / 'test'}: without one of them nothing can be reported")
    return found


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the classes in a part, sorted. Raises InputError when there are fewer than two."""
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    for name in classes:
        if not name.isascii() and any("\ud800" <= sign <= "\udfff" for sign in name):
            raise InputError(f"{folder}: the name of the class folder '{name}' is no UTF-8 text: rename it")
    if len(classes) < 2:
        loose = next((entry for entry in folder.iterdir() if entry.suffix.lower() in EXTENSIONS), None)
        mend = f": {loose.name} and the others belong into a folder for each class" if loose else ""
        raise InputError(f"{folder} holds {len(classes)} class folders; at least two are needed{mend}")
    return classes


def first_image(folder: Path) -> Path:
    """An image file of a class. Raises InputError where it has none."""
    found = min((path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS), default=None)
    if found is None:
        raise InputError(f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def list_images(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """The image files of a part and their class numbers. Raises InputError unless it has exactly these classes."""
    there = set(class_folders(folder))
    for name, wrong in (("lacks", set(classes) - there), ("has, unlike the training set,", there - set(classes))):
        if wrong:
            raise InputError(f"{folder} {name} {len(wrong)} of the class folders, such as '{min(wrong)}'")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(f"{folder / name} holds no images ({', '.join(sorted(EXTENSIONS))})")
        paths += files
        labels += [label] * len(files)
    return paths, np.array(labels, dtype=np.int64)
