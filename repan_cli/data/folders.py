"""Load image folders: `ROOT/train/<class>/*` and `ROOT/{val,test}/<class>/*`."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from repan_cli.config.conventions import SMALL_IMAGE
from repan_cli.data import class_folders, image_files
from repan_cli.data.image_files import FileReader, UnreadableImageError
from repan_cli.data.types import ArrayImages, Labels, LazyImages, Part, RawDataset, ReadOptions
from repan_cli.errors import InputError
from repan_cli.system.notices import warn
from repan_cli.system.text import count as count_of

T = TypeVar("T")

LARGEST_RESIDENT = 16 * 2**30
LOOKED_AT = 200_000
MEND = "; data.on_error=skip skips such training images"
FORBIDDEN_ADVICE = ": give yourself the right to read it"
MEND_SCORED = "; repair or remove it: evaluation skips no image"


def load_folders(root: Path, reading: ReadOptions) -> RawDataset:
    """Load `root/train/<class>/*`, and the folders val (valid, validation) and test of the same form, if they exist.

    Images may lie deeper inside a class folder. With `reading.only`, only that part is read; its classes must be known.
    """
    folders = class_folders.part_folders(root)
    classes = _classes(root, folders, reading)
    if reading.only is not None:
        folders = {reading.only: _only(root, folders, reading.only)}
    listed = {
        part: class_folders.list_images(folder, classes, whole=reading.only is None) for part, folder in folders.items()
    }
    class_folders.tell_of_others(root, iter(listed.values()))
    size = reading.image_size or _side(listed.values(), reading)
    parts: dict[str, Part] = {}
    for part, (paths, labels, _) in listed.items():
        skip, mend = reading.skip and part == "train", MEND if part == "train" else MEND_SCORED
        reader = FileReader(paths, reading.channels, folders[part])
        if reading.streams(size):
            parts[part] = _pictures(root, reader, labels, reading, skip=skip, whole=part != "train", mend=mend)
        else:
            parts[part] = _read_images(reader, labels, size, skip=skip, mend=mend)
    return RawDataset(classes, parts, size)


def _side(listed: Iterable[class_folders.Listed], reading: ReadOptions) -> int:
    """Return the side of images for which none is set.

    It is the images' own side if all are small, square and equal in size; otherwise that of the network. Raises
    InputError if neither is known.
    """
    own = image_files.common_side(Path(path) for part in listed for path in part.paths)
    if isinstance(own, int) and (own <= SMALL_IMAGE or reading.network_size is None):
        return own
    if reading.network_size is None:
        raise InputError(str(own))
    return reading.network_size


def _classes(root: Path, folders: dict[str, Path], reading: ReadOptions) -> tuple[str, ...]:
    """Return the classes in order. For a part that is read alone, they are given."""
    if reading.only is not None and not isinstance(reading.order, str):
        return tuple(unicodedata.normalize("NFC", name) for name in reading.order)
    alone = reading.only is not None and "train" not in folders
    first = _only(root, folders, str(reading.only)) if alone else class_folders.training_folder(root, folders)
    names = class_folders.class_folders(first)
    return class_folders.ordered([*names], reading.order, root)


def _only(root: Path, folders: dict[str, Path], part: str) -> Path:
    """Return the folder of the part to read alone; without a test part, that of the validation part takes its place."""
    if part in folders:
        return folders[part]
    if part == "test" and "val" in folders:
        return folders["val"]
    raise InputError(f"{root} has no folder for the part {part}; --data-root names another place")


def _read_images(reader: FileReader, labels: Labels, size: int, *, skip: bool, mend: str) -> ArrayImages:
    shape = (len(labels), size, size, reader.channels)
    if math.prod(shape) > LARGEST_RESIDENT:
        raise InputError(
            f"{len(labels):,} images of {size} pixels do not fit in memory: set a smaller data.image_size, or "
            "data.crop=resized, which reads them one by one"
        )
    images = np.empty(shape, dtype=np.uint8)  # filled in place: a list of images to stack would take twice the memory

    def read(index: int) -> bool:
        images[index] = np.asarray(image_files.square(reader(index), size)).reshape(shape[1:])
        return True

    kept = np.array([found is not None for found in _outcomes(read, len(labels), skip=skip, mend=mend)])
    names = np.array([*reader.names(np.flatnonzero(kept))])
    return ArrayImages(images if kept.all() else images[kept], labels[kept], names)


def _pictures(
    root: Path, reader: FileReader, labels: Labels, reading: ReadOptions, *, skip: bool, whole: bool, mend: str
) -> LazyImages:
    """Return images that are read on demand, and check them now, so that a run does not fail near its end.

    The check reads their headers, or with `whole` the entire images. It is left out for very large sets, and for
    training images that the loader may skip.
    """

    def look(index: int) -> bool:
        image_files.check(reader.path(index), whole=whole)
        return True

    count = len(labels)
    kept = np.ones(count, dtype=bool)
    if reading.left_out is not None and not whole:
        known = set(reading.left_out)
        kept = np.array([_named(reader.path(number), root) not in known for number in range(count)])
    elif count <= LOOKED_AT:
        kept = np.array([found is not None for found in _outcomes(look, count, skip=skip, mend=mend)])
    left_out = tuple(_named(reader.path(number), root) for number in np.flatnonzero(~kept).tolist())
    return LazyImages(reader, labels[kept], np.flatnonzero(kept), left_out)


def _named(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _outcomes(read: Callable[[int], T], count: int, *, skip: bool, mend: str) -> list[T | None]:
    """Return the result of `read` for each number; with `skip`, None and a warning for images that cannot be read.

    `mend` is the end of the error message for images that must be read: the way out.
    """
    failed: list[UnreadableImageError] = []

    def outcome(index: int) -> T | None:
        try:
            return read(index)
        except UnreadableImageError as error:
            failed.append(error)
            return None

    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        found = list(pool.map(outcome, range(count)))
    if failed and len(failed) == count:
        raise UnreadableImageError(f"none of the {count_of(count, 'image')} of a folder can be read; one: {failed[0]}")
    forbidden = [error for error in failed if not error.may_be_skipped]
    if failed and (not skip or forbidden):
        errors, advice = (forbidden, FORBIDDEN_ADVICE) if forbidden else (failed, mend)
        more = f" (and {count_of(len(errors) - 1, 'other')})" if len(errors) > 1 else ""
        raise UnreadableImageError(f"{errors[0]}{more}{advice}")
    if failed:
        verb = "is" if len(failed) == 1 else "are"
        told = f"{len(failed)} of {count_of(count, 'image')} of the training folder cannot be read and {verb} left out"
        warn(f"{told}; one of them: {failed[0]}")
    return found
