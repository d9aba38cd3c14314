"""Data sets: one specification each. Adding one takes one `DatasetSpec`; those that ship with repan are in `known.py`.

What every loader returns is `Raw`: parts named train, val and test, of which a set has train and at least one other.
`load` turns that into a `Dataset` with the validation part split off. A part is whole in memory (`Images`, small
images) or read from where it lies when it is asked for (`Pictures`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from repan_cli import config
from repan_cli.console import count as count_of
from repan_cli.console import warn
from repan_cli.data import pictures
from repan_cli.data.pictures import UnreadableImageError
from repan_cli.errors import InputError
from repan_cli.registry import Registry

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_SMALL = 64
"""Images of at most this side live in memory and are cropped with padding; larger ones are read one by one, and a part
of each is resized.
"""

LARGEST_RESIDENT = 16 * 2**30
LOOKED_AT = 200_000


class Images(NamedTuple):
    """Images as uint8 (N, H, W, C) and their class numbers as int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, chosen: np.ndarray) -> Images:
        return Images(self.images[chosen], self.labels[chosen])


class Reader(Protocol):
    """Opens one picture of many, by number; picklable, for the processes that load."""

    def __call__(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Pictures:
    """Pictures that are read when they are asked for: number `index[i]` of the reader's, of class `labels[i]`."""

    read: Reader
    labels: np.ndarray
    index: np.ndarray

    def take(self, chosen: np.ndarray) -> Pictures:
        return Pictures(self.read, self.labels[chosen], self.index[chosen])


Part = Images | Pictures


class Raw(NamedTuple):
    classes: tuple[str, ...]
    parts: dict[str, Part]


@dataclass(frozen=True)
class Reading:
    """How images are to be read.

    `image_size` None is their own, `channels` 1 or 3; `crop` as the setting `data.crop`; `skip` leaves out training
    images that cannot be read; `classes` is the number of those of synthetic data.
    """

    image_size: int | None = None
    channels: int = 3
    crop: str = "auto"
    skip: bool = False
    classes: int = 10

    def streams(self, size: int) -> bool:
        """Whether images of this side are read one by one."""
        return self.crop == "resized" or (self.crop == "auto" and size > LARGEST_SMALL)


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read.

    `load(root, reading)` reads it. Mean and std are those of the training images in [0, 1]. `flip` is False where a
    mirrored image is another thing, such as a digit. `policy` names the AutoAugment policy that was found for it;
    `image_size` is None where images have one of their own.
    """

    text: str
    load: Callable[[Path, Reading], Raw]
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
        """The part called train, val or test. Raises InputError when there is no validation part."""
        images = getattr(self, name)
        if images is None:
            raise InputError(
                f"{self.name} has no validation part: it was trained with data.val_fraction=0; use --split test"
            )
        return images


DATASETS: Registry[DatasetSpec] = Registry("data set")
PREFIXES: dict[str, Callable[[str], DatasetSpec]] = {}
"""Makers of the specifications of names like `hfds/...`, by what stands before the slash."""


def load(
    name: str,
    root: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    crop: str = "auto",
    on_error: str = "stop",
    classes: int | None = None,
    per_class: int | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Read a data set, or a part of it, and hold out its validation part.

    `classes` keeps the first so many by name, in all parts; `per_class` the first so many training images of each.
    A folder set with both val and test uses them as they are. Otherwise the one it has is the test set, and
    `val_fraction` of the training set, stratified and drawn by `split_seed` alone, is held out.
    """
    spec = _specification(name)
    mean, std = _statistics(spec, channels)
    reading = Reading(image_size or spec.image_size, len(mean), crop, on_error == "skip", classes or 10)
    raw = spec.load(Path(root), reading)
    _check_labels(name, raw)
    if classes not in (None, len(raw.classes)):
        raw = _first_classes(name, raw, classes)
    _warn_of_empty_classes(name, raw)
    if per_class is not None:
        raw = _first_images(raw, per_class)
    parts = {part: _fitted(images, reading) for part, images in raw.parts.items()}
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    digest = ""
    if test is None:
        val, test = None, val
    if val is None and val_fraction > 0:
        held_out = stratified(train.labels, val_fraction, split_seed)
        if not held_out.any():
            raise InputError(
                f"with one training image a class none of {name} can be held out: set data.val_fraction=0, or "
                "data.per_class above 1"
            )
        digest = hashlib.sha256(np.packbits(held_out).tobytes() + train.labels.tobytes()).hexdigest()
        train, val = train.take(~held_out), train.take(held_out)
    size = train.images.shape[1] if isinstance(train, Images) else reading.image_size or _side(train)
    return Dataset(name, raw.classes, mean, std, spec.flip, spec.policy, size, train, val, test, digest)


def settings_of(data: config.Data) -> dict[str, Any]:
    """The arguments of `load` that these settings mean."""
    return {
        "name": data.name,
        "root": data.root,
        "image_size": data.image_size,
        "channels": data.channels,
        "crop": data.crop,
        "on_error": data.on_error,
        "classes": data.classes,
        "per_class": data.per_class,
        "val_fraction": data.val_fraction,
        "split_seed": data.split_seed,
    }


def _specification(name: str) -> DatasetSpec:
    prefix, slash, _ = name.partition("/")
    return PREFIXES[prefix](name) if slash and prefix in PREFIXES else DATASETS[name]


def _statistics(spec: DatasetSpec, channels: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel, also of a colour set read in grey or the other way round."""
    if channels in (None, len(spec.mean)):
        return spec.mean, spec.std
    return tuple((sum(values) / len(values),) * channels for values in (spec.mean, spec.std))


def _check_labels(name: str, raw: Raw) -> None:
    for part, images in raw.parts.items():
        if not len(images.labels):
            raise InputError(f"the {part} part of {name} holds no images: is it half-downloaded?")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= len(raw.classes):
            wrong = low if low < 0 else high
            raise InputError(f"{name} has {len(raw.classes)} classes, but its {part} part holds the label {wrong}")


def _warn_of_empty_classes(name: str, raw: Raw) -> None:
    lacking = set(range(len(raw.classes))) - set(np.unique(raw.parts["train"].labels).tolist())
    if lacking:
        first = raw.classes[min(lacking)]
        warn(f"{len(lacking)} of the classes of {name}, such as '{first}', have no training image")


def _first_classes(name: str, raw: Raw, count: int) -> Raw:
    """With the first `count` classes by name alone, numbered anew in the order that they had."""
    if count > len(raw.classes):
        raise InputError(f"data.classes={count}, but {name} has {len(raw.classes)} classes: give at most as many")
    by_name = sorted(range(len(raw.classes)), key=lambda number: raw.classes[number])
    chosen = sorted(by_name[:count])
    numbers = np.full(len(raw.classes), -1)
    numbers[chosen] = np.arange(count)
    parts = {part: _renumbered(images, numbers) for part, images in raw.parts.items()}
    for part, images in parts.items():
        if not len(images.labels):
            raise InputError(f"data.classes={count} leaves no image in the {part} part of {name}: give more")
    return Raw(tuple(raw.classes[number] for number in chosen), parts)


def _renumbered(part: Part, numbers: np.ndarray) -> Part:
    """The images whose class has a new number in `numbers` (classes,), where -1 is none."""
    kept = part.take(numbers[part.labels] >= 0)
    labels = numbers[kept.labels]
    return Images(kept.images, labels) if isinstance(kept, Images) else Pictures(kept.read, labels, kept.index)


def _first_images(raw: Raw, count: int) -> Raw:
    """With at most `count` training images of each class, the first ones; all that do not train are kept."""
    train = raw.parts["train"]
    return raw._replace(parts={**raw.parts, "train": train.take(first_of_each(train.labels, count))})


def _fitted(part: Part, reading: Reading) -> Part:
    """In the size and with the channels asked for; images in memory that are to be cropped and resized, as pictures."""
    if isinstance(part, Pictures):
        return part
    images = _with_channels(part.images, reading.channels)
    size = reading.image_size or images.shape[1]
    if reading.streams(size):
        return Pictures(pictures.ArrayReader(images), part.labels, np.arange(len(images)))
    if images.shape[1:3] != (size, size):
        resized = [np.asarray(pictures.square(pictures.as_picture(image), size)) for image in images]
        images = np.stack(resized).reshape(-1, size, size, reading.channels)
    return Images(images, part.labels)


def _with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]


def _side(part: Pictures) -> int:
    return part.read(int(part.index[0])).width


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A mask (N,) that holds out `fraction` of every class, drawn by `seed`: at least one image, and never all."""
    mask = np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[members[:count]] = True
    return mask


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """A mask (N,) of the first `count` images of every class."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[:count]] = True
    return mask


# ---------------------------------------------------------------------------------------------- image folders


def load_folders(root: Path, reading: Reading) -> Raw:
    """`root/train/<class>/*` and `root/val/<class>/*` or `root/test/<class>/*`; `validation` is `val`."""
    folders = pictures.part_folders(root)
    classes = pictures.class_folders(folders["train"])
    listed = {part: pictures.list_images(folder, classes) for part, folder in folders.items()}
    size = reading.image_size or pictures.own_size(listed["train"][0][0], reading.channels)
    parts = {}
    for part, (paths, labels) in listed.items():
        skip = reading.skip and part == "train"
        if reading.streams(size):
            parts[part] = _pictures(paths, labels, reading, skip=skip, whole=part != "train")
        else:
            parts[part] = _read_images(paths, labels, size, reading, skip=skip)
    return Raw(classes, parts)


def _read_images(paths: list[Path], labels: np.ndarray, size: int, reading: Reading, *, skip: bool) -> Images:
    if len(paths) * size * size * reading.channels > LARGEST_RESIDENT:
        raise InputError(
            f"{len(paths):,} images of {size} pixels do not fit in memory: set a smaller data.image_size, or "
            "data.crop=resized, which reads them one by one"
        )
    crop = reading.image_size is not None

    def read(index: int) -> np.ndarray:
        return np.asarray(_at_size(paths[index], size, reading.channels, crop=crop))

    images = _outcomes(read, len(paths), skip=skip)
    kept = np.array([image is not None for image in images])
    stacked = np.stack([image for image in images if image is not None])
    return Images(stacked.reshape(-1, size, size, reading.channels), labels[kept])


def _at_size(path: Path, size: int, channels: int, *, crop: bool) -> Image.Image:
    image = pictures.open_image(path, channels)
    if not crop and image.size != (size, size):
        raise InputError(
            f"{path} is {image.width}x{image.height} pixels, others are {size}x{size}: set data.image_size"
        )
    return pictures.square(image, size)


def _pictures(paths: list[Path], labels: np.ndarray, reading: Reading, *, skip: bool, whole: bool) -> Pictures:
    """Files to be read when they are asked for; looked at now, unless there are very many: their headers, or, as a run
    must not fail at its end, `whole` images.
    """

    def look(index: int) -> bool:
        pictures.check(paths[index], whole=whole)
        return True

    kept = np.ones(len(paths), dtype=bool)
    if len(paths) <= LOOKED_AT:
        kept = np.array([found is not None for found in _outcomes(look, len(paths), skip=skip)])
    return Pictures(pictures.FileReader(paths, reading.channels), labels[kept], np.flatnonzero(kept))


def _outcomes(read: Callable[[int], Any], count: int, *, skip: bool) -> list[Any]:
    """What `read` gives for each number; with `skip` None for images that cannot be read, and a warning."""
    failed = []

    def outcome(index: int) -> Any:
        try:
            return read(index)
        except UnreadableImageError as error:
            failed.append(error)

    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        found = list(pool.map(outcome, range(count)))
    if failed and not skip:
        more = f" (and {count_of(len(failed) - 1, 'other')})" if len(failed) > 1 else ""
        raise UnreadableImageError(f"{failed[0]}{more}")
    if failed:
        warn(f"{len(failed)} of {count:,} training images cannot be read and are left out; one of them: {failed[0]}")
    return found


DATASETS.register("folder")(
    DatasetSpec(
        "your own images: ROOT/train/<class>/*, ROOT/{val,test}/<class>/*", load_folders, IMAGENET_MEAN, IMAGENET_STD
    )
)
