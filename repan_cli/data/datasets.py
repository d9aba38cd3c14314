"""Data sets: one specification each. Adding one takes one `DatasetSpec`; those of the package are in `builtin.py`.

Every loader returns a `RawDataset`: parts named train, val and test, of which a set has train. Image folders may have
nothing else.
`load` turns that into a `Dataset` with the validation part split off. A part is whole in memory (`ArrayImages`, small
images) or read from where it lies when it is asked for (`LazyImages`).
"""

from __future__ import annotations

import hashlib
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
    keep: bool = False,
    known_split: str = "",
) -> Dataset:
    """Read a data set, or a part of it, and hold out its validation part.

    `classes` keeps the first so many by name, in all parts; `per_class` the first so many training images of each.
    A folder set with both val and test uses them as they are. Otherwise the one it has is the test set, and
    `val_fraction` of the training set, stratified and drawn by `split_seed` alone, is held out; where it has neither,
    `test_fraction` before that is the test set. `class_order` is that of the classes of a folder set; with `only` just
    that part of it is read, and the others are empty. `download` allows to fetch a set that is not there.
    `keep` leaves it to the loader to skip images. `network_size`: of folders whose images have no size of their own. Of
    a `known_split`, by its digest, the user has been told.
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
        keep=keep,
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
    """Read a data set with all its parts, of its classes the first so many."""
    raw = spec.load(root, reading)
    _check_labels(name, raw)
    return raw if classes in (None, len(raw.classes)) else first_classes(name, raw, classes)


def _with_validation_part(name: str, train: Part, fraction: float, seed: int, before: str) -> tuple[Part, Part, str]:
    """Hold a validation part out of the training part; returns both, and the digest of all draws."""
    held_out = stratified(train.labels, fraction, seed)
    if not held_out.any():
        raise InputError(
            f"{name} has one training image per class, so none can be held out: set data.val_fraction=0, or "
            "data.per_class above 1"
        )
    return train.take(~held_out), train.take(held_out), _digest_of_split(held_out, train.labels, before)


def _with_test_part(name: str, root: Path, raw: RawDataset, fraction: float, seed: int) -> tuple[RawDataset, str, str]:
    """Draw a test part from a set that has but a training part. Returns the digest of the draw, and its description."""
    train = raw.parts["train"]
    drawn = stratified(train.labels, fraction, seed)
    if not drawn.any():
        raise InputError(f"{root} has one training image per class, and no val or test part: nothing can be reported")
    flat = name == "folder" and not class_folders.named_parts(root)
    lacks = f"{root} has no parts" if flat else f"neither {root / 'val'} nor {root / 'test'}"
    of = "images" if flat else f"training images of {name}"
    told = (
        f"{lacks}: {drawn.sum():,} of the {len(drawn):,} {of} are drawn as its test part, evenly over the classes "
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
    """Return a data set of one part; the others are empty."""
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
"""The content of the folder of a data set by name: parts, or the files of its makers."""


def check_name(name: str) -> None:
    """Raise InputError for an unknown data set."""
    _specification(name)


def check(name: str, root: str | Path) -> None:
    """Raise InputError for an unknown data set, for image folders that are not there, and for the folder of a data set
    in place of the one around it. Reads no image.
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
    """Return mean and std of each channel, also of a colour set read in grey or the other way round."""
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
    """Bring a part to the size and channels asked for; images in memory that are to be resized become pictures."""
    if isinstance(part, LazyImages):
        return part
    images = _with_channels(part.images, reading.channels)
    size = reading.image_size or images.shape[1]
    if reading.streams(size):
        return LazyImages(image_files.ArrayReader(images), part.labels, np.arange(len(images)))
    if images.shape[1:3] != (size, size):
        resized = [np.asarray(image_files.square(image_files.as_picture(image), size)) for image in images]
        images = np.stack(resized).reshape(-1, size, size, reading.channels)
    return ArrayImages(images, part.labels)


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
