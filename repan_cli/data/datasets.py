"""Load data sets, each from one specification. To add one, write a `DatasetSpec`; the built-in ones are in
`builtin.py`.

Every specification returns a `RawDataset` with parts named train, val and test; all sets have train, and image folders
may have only train. `load` turns it into a `Dataset` with a validation part. A part is either in memory (`ArrayImages`,
small images) or read on demand (`LazyImages`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repan_cli import config
from repan_cli.data import class_folders, digits, image_files
from repan_cli.data.subset import first_classes, first_images, stratified
from repan_cli.data.types import (
    DATASETS,
    PREFIXES,
    ArrayImages,
    Dataset,
    DatasetSpec,
    Labels,
    LazyImages,
    Mask,
    Part,
    Pixels,
    RawDataset,
    ReadOptions,
)
from repan_cli.errors import InputError
from repan_cli.system.notices import warn
from repan_cli.system.text import quoted
from repan_cli.system.user_code import names_a_file

Numbers = tuple[float, ...]


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
    test_fraction: float = 0.2,
    split_seed: int = 0,
    class_order: str | Sequence[str] = "text",
    only: str | None = None,
    download: bool = True,
    network_size: int | None = None,
    left_out: tuple[str, ...] | None = None,
    known_split: str = "",
) -> Dataset:
    """Read a data set, or one part of it, and hold out its validation part.

    A data set with both val and test keeps them. If it has only one of the two, that one is the test set, and
    `val_fraction` of the training set is held out for validation. If it has neither, `test_fraction` is held out first.
    Both draws are stratified and depend only on `split_seed`. A split whose digest is `known_split` is not reported.

    `classes` keeps the first classes by name, `per_class` the first training images of each. With `only`, just that
    part of image folders is read. `network_size` is the side for folders without a common size; `left_out` is that of
    `ReadOptions`. Raises InputError for data that are missing, damaged, or do not fit the arguments.
    """
    spec = _specification(name)
    mean, std = _statistics(spec, channels)
    reading = ReadOptions(
        *(image_size or spec.image_size, len(mean), crop),
        skip=on_error == "skip",
        classes=classes or 10,
        download=download,
        order=class_order if isinstance(class_order, str) else tuple(class_order),
        only=only,
        network_size=network_size,
        left_out=left_out,
    )
    raw, digest, drawn = _read(name, spec, Path(root), reading, classes), "", ""
    if only is not None:
        return _alone(name, spec, raw, reading, (mean, std), only)
    _warn_of_empty_classes(name, raw)
    if raw.parts.keys() == {"train"}:
        raw, digest, drawn = _with_test_part(name, Path(root), raw, test_fraction, split_seed)
    if per_class is not None:
        raw = first_images(raw, per_class)
    parts = {part: _fitted(images, reading) for part, images in raw.parts.items()}
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if test is None:
        val, test = None, parts["val"]
    if val is None and val_fraction > 0:
        train, val, digest = _with_validation_part(name, train, val_fraction, split_seed, digest)
    if drawn and digest != known_split:
        warn(drawn)
    look = (mean, std, spec.flip, spec.policy, _size(train, raw, reading))
    return Dataset(name, raw.classes, *look, train, val, test, digest)


def _read(name: str, spec: DatasetSpec, root: Path, reading: ReadOptions, classes: int | None) -> RawDataset:
    """Read all parts of a data set, limited to its first `classes` classes."""
    raw = spec.load(root, reading)
    _check_labels(name, raw)
    return raw if classes in (None, len(raw.classes)) else first_classes(name, raw, classes)


def _with_validation_part(name: str, train: Part, fraction: float, seed: int, before: str) -> tuple[Part, Part, str]:
    """Hold out a validation part of the training part; return both, and the digest of all draws."""
    held_out = stratified(train.labels, fraction, seed)
    if not held_out.any():
        raise InputError(
            f"{name} has one training image per class, so none can be held out: set data.val_fraction=0, or "
            "data.per_class above 1"
        )
    return train.take(~held_out), train.take(held_out), _digest_of_split(held_out, train.labels, before)


def _with_test_part(name: str, root: Path, raw: RawDataset, fraction: float, seed: int) -> tuple[RawDataset, str, str]:
    """Draw a test part from a set that has only a training part.

    Return the set, the draw's digest, and its description.
    """
    train = raw.parts["train"]
    drawn = stratified(train.labels, fraction, seed)
    if not drawn.any():
        raise InputError(f"{root} has one training image per class and no val or test part: add images to test on")
    flat = name == "folder" and not class_folders.named_parts(root)
    lacks = f"{root} has no folders train and test" if flat else f"there is neither {root / 'val'} nor {root / 'test'}"
    of = "images" if flat else f"training images of {name}"
    told = (
        f"{lacks}: {drawn.sum():,} of the {len(drawn):,} {of} become the test part, evenly over the classes "
        "(data.test_fraction, data.split_seed)"
    )
    parts = {"train": train.take(~drawn), "test": train.take(drawn)}
    return raw._replace(parts=parts), _digest_of_split(drawn, train.labels, ""), told


def _digest_of_split(held_out: Mask, labels: Labels, before: str) -> str:
    content = before.encode() + np.packbits(held_out).tobytes() + labels.tobytes()
    return hashlib.sha256(content).hexdigest()


def _alone(
    name: str, spec: DatasetSpec, raw: RawDataset, reading: ReadOptions, look: tuple[Numbers, Numbers], only: str
) -> Dataset:
    """Return a data set with one part; the others are empty."""
    part = _fitted(raw.parts[only], reading)
    empty = part.take(np.zeros(len(part.labels), dtype=bool))
    train, val, test = (part if each == only else empty for each in ("train", "val", "test"))
    size = _size(part, raw, reading)
    return Dataset(name, raw.classes, *look, spec.flip, spec.policy, size, train, val, test, "")


def settings_of(data: config.DataConfig) -> dict[str, Any]:
    """Return the arguments of `load` for these settings."""
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
        "test_fraction": data.test_fraction,
        "split_seed": data.split_seed,
        "class_order": data.class_order,
    }


MARKS = ("train", "test", "val", "cifar-10*", "*_32x32.mat", "MNIST", "FashionMNIST", "*_data*")
"""The expected content of the folder of a data set known by name: parts, or the published files."""


def check_name(name: str) -> None:
    """Raise InputError for an unknown data set, for a file, and for a folder that is missing."""
    if name not in DATASETS and (names_a_file(name) or Path(name).is_file()):
        raise InputError(f"{name} is a file: give --dataset FOLDER with a folder of images for each class, or a name")
    if name.partition("/")[0] not in PREFIXES and {"/", os.sep} & set(name):
        raise InputError(f"no folder {name}: give --dataset FOLDER with a folder of images for each class")
    _specification(name)


def check(name: str, root: str | Path) -> None:
    """Raise InputError for an unknown data set or missing image folders, without reading any image.

    It also refuses the folder of a data set given in place of the folder that contains it.
    """
    check_name(name)
    place = Path(root).absolute()
    if place.name == name and not (place / name).exists() and any(file for mark in MARKS for file in place.glob(mark)):
        raise InputError(f"{root} holds {name} itself; did you mean --data-root {quoted(Path(root).parent)}?")
    if name == "digits":
        digits.check()
    folder = {"folder": Path(root), "imagenet": Path(root) / "imagenet"}.get(name)
    if folder is not None:
        class_folders.training_folder(folder, class_folders.parts_in(folder))


def _specification(name: str) -> DatasetSpec:
    prefix, slash, _ = name.partition("/")
    return PREFIXES[prefix](name) if slash and prefix in PREFIXES else DATASETS[name]


def _statistics(spec: DatasetSpec, channels: int | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel; they are averaged if a color set is read in gray, and repeated for gray in
    color.
    """
    if channels is None or channels == len(spec.mean):
        return spec.mean, spec.std
    mean, std = ((sum(values) / len(values),) * channels for values in (spec.mean, spec.std))
    return mean, std


def _check_labels(name: str, raw: RawDataset) -> None:
    for part, images in raw.parts.items():
        if not len(images.labels):
            raise InputError(f"the {part} part of {name} holds no images: is the download incomplete?")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= len(raw.classes):
            wrong = low if low < 0 else high
            raise InputError(f"{name} has {len(raw.classes)} classes, but its {part} part holds the label {wrong}")


def _warn_of_empty_classes(name: str, raw: RawDataset) -> None:
    lacking = set(range(len(raw.classes))) - set(np.unique(raw.parts["train"].labels).tolist())
    if lacking:
        first = raw.classes[min(lacking)]
        have = "has" if len(lacking) == 1 else "have"
        warn(f"{len(lacking)} of the {len(raw.classes)} classes of {name} {have} no training image, such as '{first}'")


def _fitted(part: Part, reading: ReadOptions) -> Part:
    """Bring a part to the requested size and channels.

    Images in memory that training crops and resizes become pictures.
    """
    if isinstance(part, LazyImages):
        return part
    images = _with_channels(part.images, reading.channels)
    size = reading.image_size or images.shape[1]
    if reading.streams(size):
        return LazyImages(image_files.ArrayReader(images, part.names), part.labels, np.arange(len(images)))
    if images.shape[1:3] != (size, size):
        resized = [np.asarray(image_files.square(image_files.as_picture(image), size)) for image in images]
        images = np.stack(resized).reshape(-1, size, size, reading.channels)
    return ArrayImages(images, part.labels, part.names)


def _with_channels(images: Pixels, channels: int) -> Pixels:
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]


def _size(part: Part, raw: RawDataset, reading: ReadOptions) -> int:
    """Return the side of the images of a part."""
    if isinstance(part, ArrayImages):
        return int(part.images.shape[1])
    return reading.image_size or raw.image_size or part.read(int(part.index[0])).width
