"""Open image files, and bring images to one mode and size."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from repan_cli.errors import (
    FORBIDDEN,
    FULL,
    OUT_OF_REACH,
    TOO_MANY,
    InputError,
    OutOfReachError,
    OutOfSpaceError,
    RepanError,
    is_out_of_memory,
)
from repan_cli.system.text import first_line

MODES = {1: "L", 3: "RGB"}
NUMBERS = {"F": "floats", "I": "32-bit integers"}
"""Image modes that do not hold brightness, and what they hold instead."""


warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # images twice as large are an error, which is reported


class UnreadableImageError(InputError):
    """An image that cannot be decoded; `data.on_error=skip` leaves it out of training."""

    may_be_skipped = True


class ForbiddenImageError(UnreadableImageError):
    """An image that this user may not read. It may be a good one, so training does not skip it."""

    may_be_skipped = False


NETWORK = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "huggingface_hub"}
"""Packages all of whose errors are failures of the network."""


def is_of_network(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in NETWORK


def failure(error: Exception, name: str) -> RepanError:
    """Return the error to raise for the image `name` that could not be read, by whether the image itself is the reason.

    Memory, open files, the disk, the network and permissions are not: other images would fail in the same way, and the
    same image can be read when they are there again. Such an error ends a run, whatever `data.on_error` says.
    """
    number = error.errno if isinstance(error, OSError) else None
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    of_decoder = isinstance(error, OSError) and str(error).startswith("out of memory")  # Pillow's code -9
    if is_out_of_memory(error) or of_decoder:
        mend = "set data.workers=0, or a smaller --batch-size or data.image_size; if only this image does so, remove it"
        return OutOfSpaceError(f"out of memory while reading the image {name}: {mend}")
    if number in TOO_MANY:
        return OutOfSpaceError(
            f"cannot read the image {name}: {why}: raise the system's limit ('ulimit -n'), or set data.workers=0"
        )
    if number in FULL:
        return OutOfSpaceError(f"cannot read the image {name}: {why}: free some space")
    if number in OUT_OF_REACH or isinstance(error, (ConnectionError, TimeoutError)) or is_of_network(error):
        return OutOfReachError(f"cannot read the image {name}: {why}: its disk or network drive does not deliver")
    if number in FORBIDDEN:
        return ForbiddenImageError(f"cannot read the image {name}: {why}")
    return UnreadableImageError(f"cannot read the image {name}: {why}")


# ---------------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open the image in a file and read its header. Raises UnreadableImageError, naming the file, if that fails."""
    try:
        _check_regular(path)
        with Image.open(path) as image:
            if image.mode in NUMBERS:
                raise ValueError(f"its pixels are {NUMBERS[image.mode]}, not brightness from 0 to 255")
            yield image
    except UnidentifiedImageError:
        why = "it is empty" if _is_empty(path) else "it is not an image, or is truncated"
        raise UnreadableImageError(f"cannot read the image {path}: {why}") from None
    except RepanError:
        raise
    except Exception as error:  # a decoder may fail in any way on a damaged file
        raise failure(error, str(path)) from None


def _check_regular(path: Path) -> None:
    """Raise ValueError for a name that stands for no file, or for a folder, pipe or device."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("there is no file") from None
    if not stat.S_ISREG(mode):
        raise ValueError("it is not a regular file")


def _is_empty(path: Path) -> bool:
    try:
        return not path.stat().st_size
    except OSError:
        return False


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
    for path, (width, height) in _sizes_in(iter(paths)):
        if width != height:
            return f"{path} is {width}x{height} pixels: set data.image_size, images are cropped to a square"
        if side not in (None, width):
            return f"{path} is {width}x{height} pixels, others are {side}x{side}: set data.image_size"
        side = width
    return side or "no image can be read"


def _sizes_in(paths: Iterator[Path]) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yield the sizes of the pictures that can be read, in order; in threads, as a network drive answers late.

    The first picture is read alone, then ever more at once, since photographs already differ in the first ones.
    """

    def size(path: Path) -> tuple[int, int] | None:
        try:
            return size_in(path)
        except UnreadableImageError:
            return None

    number = 1
    with ThreadPoolExecutor() as pool:
        while some := [*itertools.islice(paths, number)]:
            for path, found in zip(some, pool.map(size, some), strict=True):
                if found is not None:
                    yield path, found
            number = min(2 * number, MOST_AHEAD)


MOST_AHEAD = 1024
"""The largest number of pictures whose sizes are read at once."""


class FileReader:
    """Reads pictures from a list of files, by number.

    The names are one array of bytes, not a list of objects. Forked processes share it: reading an object would count a
    reference in it, and so copy its page of memory into every process. Other machines know the images by their names
    relative to `folder`.
    """

    def __init__(self, paths: Sequence[Path | str], channels: int, folder: Path | None = None) -> None:
        names = [os.fsencode(path) for path in paths]
        self.letters = np.frombuffer(b"".join(names), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, names)])
        self.channels = channels
        self.skipped = len(os.fsencode(folder / "_")) - 1 if folder else 0

    def __call__(self, index: int) -> Image.Image:
        path = self.path(index)
        try:
            return open_image(path, self.channels)
        except UnreadableImageError:
            if not path.parent.is_dir():
                raise OutOfReachError(
                    f"the folder {path.parent} is not there any more: was its drive removed?"
                ) from None
            raise

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self.letters[self.ends[index] : self.ends[index + 1]].tobytes()))

    def name(self, index: int) -> str:
        return str(self.path(index))

    def names(self, index: npt.NDArray[np.int64]) -> Iterator[bytes]:
        whole = self.letters.tobytes()
        for start, end in zip(self.ends[index].tolist(), self.ends[index + 1].tolist(), strict=True):
            yield whole[start + self.skipped : end]


class ArrayReader:
    """Makes pictures of images (N, H, W, C) in memory, by number."""

    def __init__(self, images: npt.NDArray[np.uint8], names: npt.NDArray[np.bytes_] | None = None) -> None:
        self.images, self.known = images, names

    def __call__(self, index: int) -> Image.Image:
        return as_picture(self.images[index])

    def name(self, index: int) -> str:
        return f"image {index}"

    def names(self, index: npt.NDArray[np.int64]) -> Iterable[bytes] | None:
        return None if self.known is None else self.known[index]


def as_picture(image: npt.NDArray[np.uint8]) -> Image.Image:
    """Convert a uint8 array (H, W, C) with 1 or 3 channels to a picture."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
