"""Define the data sets known by name: their files, as the authors publish them, and their statistics.

For every set that is not generated, image folders `ROOT/NAME/{train,test}/<class>/*` are accepted instead of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repan_cli.config.conventions import LARGE_IMAGE
from repan_cli.data import digits, pickled_arrays
from repan_cli.data.folders import load_folders
from repan_cli.data.types import (
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ArrayImages,
    DatasetSpec,
    Part,
    RawDataset,
    ReadOptions,
)
from repan_cli.errors import InputError
from repan_cli.system.notices import warn
from repan_cli.system.packages import how_to_install
from repan_cli.system.text import quoted

# ---------------------------------------------------------------------------------------------- torchvision's


def _from_torchvision(
    class_name: str, folder: str, read: Callable[[Any], RawDataset], *, parts: dict[str, dict[str, Any]]
) -> Callable[[Path, ReadOptions], RawDataset]:
    """Return a function that loads one of torchvision's data sets, and downloads it if possible.

    `read` converts one of its parts to images. `parts` holds the arguments that select train and test.
    """

    def load(root: Path, reading: ReadOptions) -> RawDataset:
        if (root / folder / "train").is_dir():
            return load_folders(root / folder, reading)
        if not reading.download and not (root / folder).is_dir():
            raise InputError(
                f"no {root / folder}: give its location with --data-root, or download it with --dataset {folder}"
            )
        from torchvision import datasets

        new_folders = [path for path in (root / folder, root) if not path.exists()]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for data
                make = _without_unpickling(getattr(datasets, class_name))
                found = {name: make(root / folder, download=reading.download, **which) for name, which in parts.items()}
        except ImportError as error:
            raise InputError(f"{folder} needs the package {error.name}: {how_to_install(error.name or '')}") from None
        except (OSError, RuntimeError) as error:
            for path in new_folders:
                with contextlib.suppress(OSError):  # removes empty folders only
                    path.rmdir()
            where = f"put its files or {{train,test}}/<class>/*.png into {root / folder}, or give --data-root"
            raise InputError(f"{folder} is not under {root} and cannot be downloaded ({error}); {where}") from None
        classes = read(found["train"]).classes
        return RawDataset(classes, {name: read(part).parts["all"] for name, part in found.items()})

    return load


def _without_unpickling(kind: type) -> type:
    """Return the same torchvision data set, but repan reads the files that torchvision would unpickle."""
    from torchvision import datasets

    if issubclass(kind, datasets.CIFAR10):
        return type(kind.__name__, (_CifarFiles, kind), {})
    if not issubclass(kind, datasets.MNIST):
        return kind
    # torch.save wrote an old form of MNIST; download the files in the new form
    return type(kind.__name__, (kind,), {"_check_legacy_exist": lambda self: False})


class _CifarFiles:
    """Reads the batches of CIFAR-10 and CIFAR-100. torchvision downloads them; the names come from its class.

    torchvision compares the MD5 of a file, then opens it again and unpickles it. This class reads exactly the bytes
    that were compared, and runs no code in them.
    """

    base_folder: str
    train_list: list[list[str]]
    test_list: list[list[str]]
    meta: dict[str, str]
    download: Callable[[], None]

    def __init__(self, root: Path, *, train: bool, download: bool) -> None:
        self.root, self.train = str(root), train
        if download:
            self.download()
        batches = [self._read(*listed) for listed in (self.train_list if train else self.test_list)]
        key = "labels" if "labels" in batches[0] else "fine_labels"
        where = Path(root) / self.base_folder
        self.data = np.concatenate([pickled_arrays.images_in(batch, where, 32) for batch in batches])
        self.targets = np.concatenate([pickled_arrays.labels_in(batch, key, where) for batch in batches])
        named = self._read(self.meta["filename"], self.meta["md5"])
        self.classes = pickled_arrays.texts_in(named, self.meta["key"], where)

    def _read(self, name: str, md5: str) -> dict[Any, Any]:
        path = Path(self.root) / self.base_folder / name
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise RuntimeError(f"{path} is damaged or not the original")
        return pickled_arrays.parse(content, path)


def _read_cifar(part: Any) -> RawDataset:
    return RawDataset(tuple(part.classes), {"all": ArrayImages(part.data, np.array(part.targets, dtype=np.int64))})


def _read_mnist(part: Any) -> RawDataset:
    return RawDataset(
        tuple(part.classes), {"all": ArrayImages(part.data.numpy()[..., None], part.targets.numpy().astype(np.int64))}
    )


def _read_svhn(part: Any) -> RawDataset:
    return RawDataset(
        digits.DIGITS, {"all": ArrayImages(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels)}
    )


TRAIN_OR_NOT = {"train": {"train": True}, "test": {"train": False}}
SPLITS = {"train": {"split": "train"}, "test": {"split": "test"}}


# ---------------------------------------------------------------------------------------------- ImageNet at 16 pixels

PIXELS = 16


def _load_imagenet16(classes: int) -> Callable[[Path, ReadOptions], RawDataset]:
    """Return a function that loads the first `classes` classes of downsampled ImageNet (Chrabaszcz et al. 2017)."""

    def load(root: Path, reading: ReadOptions) -> RawDataset:
        folder = root / "imagenet16"
        if (folder / "train").is_dir():
            return load_folders(folder, reading)
        train = [_read_batch(folder / f"train_data_batch_{number}", classes) for number in range(1, 11)]
        images, labels = (np.concatenate([batch[place] for batch in train]) for place in (0, 1))
        names = tuple(f"{number:04d}" for number in range(1, classes + 1))
        return RawDataset(
            names, {"train": ArrayImages(images, labels), "test": _read_batch(folder / "val_data", classes)}
        )

    return load


def _read_batch(path: Path, classes: int) -> ArrayImages:
    try:
        batch = pickled_arrays.read(path)
    except OSError as error:
        what = f"cannot read {path}: {error.strerror or error}"
        raise InputError(
            f"{what}; imagenet16 is not downloaded: put its train_data_batch_1..10 and val_data there"
        ) from None
    images, labels = pickled_arrays.images_in(batch, path, PIXELS), pickled_arrays.labels_in(batch, "labels", path)
    if not len(labels) or len(images) != len(labels) or labels.min() < 1 or labels.max() > 1000:
        raise InputError(f"{path} holds {len(images)} images and {len(labels)} labels, which must be 1 to 1000")
    kept = labels <= classes
    return ArrayImages(np.ascontiguousarray(images[kept]), labels[kept] - 1)


# ---------------------------------------------------------------------------------------------- ImageNet

IMAGENET_CLASSES = 1000


def _load_imagenet(root: Path, reading: ReadOptions) -> RawDataset:
    """Load `ROOT/imagenet/{train,val}/<class>/*` with all 1,000 classes."""
    raw = load_folders(root / "imagenet", reading)
    if len(raw.classes) != IMAGENET_CLASSES:
        raise InputError(
            f"{root / 'imagenet'} holds {len(raw.classes)} of ImageNet's {IMAGENET_CLASSES} classes: is the "
            f"download incomplete? Train on a part with --dataset folder --data-root {quoted(root / 'imagenet')}"
        )
    return raw


# ---------------------------------------------------------------------------------------------- noise, for speed tests

NOISE_BYTES, MOST_NOISE = 2**28, 10_000


def _load_noise(root: Path, reading: ReadOptions) -> RawDataset:
    """Generate random pixels and labels. Scores on them mean nothing."""
    warn("the synthetic data set is noise for speed tests: accuracy on it is meaningless")
    size, draw = reading.image_size or 32, np.random.default_rng(0)
    parts: dict[str, Part] = {}
    for part, most in (("train", MOST_NOISE), ("test", MOST_NOISE // 10)):
        count = max(2 * reading.classes, min(most, NOISE_BYTES // (size**2 * reading.channels)))
        images = draw.integers(0, 256, (count, size, size, reading.channels), dtype=np.uint8)
        parts[part] = ArrayImages(images, np.arange(count) % reading.classes)
    return RawDataset(tuple(f"class {number}" for number in range(reading.classes)), parts)


# ---------------------------------------------------------------------------------------------- specifications

DATASETS.register("folder")(
    DatasetSpec(
        "your own images: ROOT/<class>/*, or ROOT/{train,val,test}/<class>/*", load_folders, IMAGENET_MEAN, IMAGENET_STD
    )
)

DATASETS.register("digits")(
    DatasetSpec(
        "8x8 handwritten digits from scikit-learn, no download: the demo", digits.load, (0.305,), (0.376,), flip=False
    )
)
DATASETS.register("cifar10")(
    DatasetSpec(
        "32x32 photographs, 10 classes, 60,000 images",
        _from_torchvision("CIFAR10", "cifar10", _read_cifar, parts=TRAIN_OR_NOT),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        policy="cifar10",
    )
)
DATASETS.register("cifar100")(
    DatasetSpec(
        "32x32 photographs, 100 classes, 60,000 images",
        _from_torchvision("CIFAR100", "cifar100", _read_cifar, parts=TRAIN_OR_NOT),
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
        policy="cifar10",
    )
)
DATASETS.register("svhn")(
    DatasetSpec(
        "32x32 house numbers, 10 classes, 99,289 images",
        _from_torchvision("SVHN", "svhn", _read_svhn, parts=SPLITS),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        flip=False,
        policy="svhn",
    )
)
DATASETS.register("mnist")(
    DatasetSpec(
        "28x28 handwritten digits, gray, 70,000 images",
        _from_torchvision("MNIST", "mnist", _read_mnist, parts=TRAIN_OR_NOT),
        (0.1307,),
        (0.3081,),
        flip=False,
    )
)
DATASETS.register("fashionmnist")(
    DatasetSpec(
        "28x28 pieces of clothing, gray, 10 classes, 70,000 images",
        _from_torchvision("FashionMNIST", "fashionmnist", _read_mnist, parts=TRAIN_OR_NOT),
        (0.2860,),
        (0.3530,),
    )
)
DATASETS.register("imagenet")(
    DatasetSpec(
        "ImageNet-1k at 224 pixels, from ROOT/imagenet/{train,val}/<class>/*",
        _load_imagenet,
        IMAGENET_MEAN,
        IMAGENET_STD,
        image_size=LARGE_IMAGE,
    )
)
DATASETS.register("synthetic")(
    DatasetSpec(
        "noise, for speed tests only; data.classes and data.image_size choose", _load_noise, (0.5,) * 3, (0.29,) * 3
    )
)
for _classes in (1000, 200, 150, 120):
    DATASETS.register("imagenet16" if _classes == 1000 else f"imagenet16_{_classes}")(
        DatasetSpec(
            f"ImageNet at 16x16 pixels, {'all' if _classes == 1000 else 'the first'} {_classes} classes",
            _load_imagenet16(_classes),
            (0.4811, 0.4575, 0.4079),
            (0.2479, 0.2402, 0.2553),
        )
    )
