"""Open image files, and bring images to one mode and size."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from repan_cli.errors import InputError
from repan_cli.system.text import first_line

MODES = {1: "L", 3: "RGB"}
NUMBERS = {"F": "floats", "I": "32-bit integers"}
"""Image modes that do not hold brightness, and what they hold instead."""


warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # images twice as large are an error, which is reported


class UnreadableImageError(InputError):
    """An image that cannot be decoded; `data.on_error=skip` leaves it out of training."""


# ---------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open the image in a file and read its header. Raises UnreadableImageError, naming the file, if that fails."""
    try:
        if not path.is_file():
            raise ValueError("there is no file" if not path.exists() else "it is not a regular file")
        with Image.open(path) as image:
            if image.mode in NUMBERS:
                raise ValueError(f"its pixels are {NUMBERS[image.mode]}, not brightness from 0 to 255")
            yield image
    except UnidentifiedImageError:
        why = "it is not an image, or is truncated" if path.stat().st_size else "it is empty"
        raise UnreadableImageError(f"cannot read the image {path}: {why}") from None
    except InputError:
        raise
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise UnreadableImageError(f"cannot read the image {path}: {first_line(error)}") from None


def check(path: Path, *, whole: bool) -> None:
    """Raise UnreadableImageError if a file does not begin like an image or, with `whole`, cannot be decoded."""
    with _opened(path) as image:
        if whole:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))  # JPEGs: read them at 1/8
            image.load()


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """Read the upright picture in a file, RGB or gray, with 8 bits a channel.

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
    """Crop to a square and resize: whole-number reductions average pixels, others are bicubic with antialiasing."""
    if image.size == (size, size):
        return image
    whole = image.width % size == 0 and image.height % size == 0
    return ImageOps.fit(image, (size, size), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC)


def size_in(path: Path) -> tuple[int, int]:
    """Read width and height of the picture in a file from its header. Raises UnreadableImageError."""
    with _opened(path) as image:
        return image.size


def common_side(paths: Iterable[Path]) -> int | str:
    """Return the common side of square pictures of one size; otherwise a text that says how they differ.

    Pictures that cannot be read are ignored. The search ends at the first difference.
    """
    side = None
    for path in paths:
        try:
            width, height = size_in(path)
        except UnreadableImageError:
            continue
        if width != height:
            return f"{path} is {width}x{height} pixels: set data.image_size, images are cropped to a square"
        if side not in (None, width):
            return f"{path} is {width}x{height} pixels, others are {side}x{side}: set data.image_size"
        side = width
    return side or "no image can be read"


class FileReader:
    """Reads pictures from a list of files, by number."""

    def __init__(self, paths: list[Path], channels: int) -> None:
        self.paths, self.channels = paths, channels

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.paths[index], self.channels)

    def name(self, index: int) -> str:
        return str(self.paths[index])


class ArrayReader:
    """Makes pictures of images (N, H, W, C) in memory, by number."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self.images = images

    def __call__(self, index: int) -> Image.Image:
        return as_picture(self.images[index])

    def name(self, index: int) -> str:
        return f"image {index}"


def as_picture(image: npt.NDArray[np.uint8]) -> Image.Image:
    """Convert a uint8 array (H, W, C) with 1 or 3 channels to a picture."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
