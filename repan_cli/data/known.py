"""The data sets that are known by name: their files, as their makers publish them, and their statistics.

Image folders `ROOT/NAME/{train,test}/<class>/*` are accepted in place of the files of every set that has any.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repan_cli.data.datasets import DATASETS, DatasetSpec, Images, Raw, load_folders, stratified
from repan_cli.errors import InputError

DIGITS = tuple(str(digit) for digit in range(10))

# ---------------------------------------------------------------------------------------------- digits


def _load_digits(root: Path, image_size: int | None) -> Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits data set comes with scikit-learn: pip install 'repan-cli[demo]'") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = stratified(labels, 0.2, seed=0)
    parts = {"train": Images(images[~test], labels[~test]), "test": Images(images[test], labels[test])}
    return Raw(tuple(str(name) for name in bunch.target_names), parts)


# ---------------------------------------------------------------------------------------------- torchvision's


def _from_torchvision(
    class_name: str, folder: str, read: Callable[[Any], Raw], *, parts: dict[str, dict[str, Any]]
) -> Callable[[Path, int | None], Raw]:
    """A loader that reads, and downloads where it can, one of torchvision's data sets.

    `read` turns one of its parts into images; `parts` holds the arguments that mean train and test.
    """

    def load(root: Path, image_size: int | None) -> Raw:
        if (root / folder / "train").is_dir():
            return load_folders(root / folder, image_size)
        from torchvision import datasets

        new_folders = [path for path in (root / folder, root) if not path.exists()]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for data
                make = getattr(datasets, class_name)
                found = {name: make(root / folder, download=True, **which) for name, which in parts.items()}
        except ImportError as error:
            raise InputError(f"{folder} needs the package {error.name}: pip install {error.name}") from None
        except (OSError, RuntimeError) as error:
            for path in new_folders:
                with contextlib.suppress(OSError):  # only what is empty goes
                    path.rmdir()
            where = f"put its files or {{train,test}}/<class>/*.png into {root / folder}, or give --data-root"
            raise InputError(f"{folder} is not under {root} and cannot be downloaded ({error}); {where}") from None
        classes, _ = read(found["train"])
        return Raw(classes, {name: read(part).parts["all"] for name, part in found.items()})

    return load


def _read_cifar(part: Any) -> Raw:
    return Raw(tuple(part.classes), {"all": Images(part.data, np.array(part.targets, dtype=np.int64))})


def _read_mnist(part: Any) -> Raw:
    return Raw(
        tuple(part.classes), {"all": Images(part.data.numpy()[..., None], part.targets.numpy().astype(np.int64))}
    )


def _read_svhn(part: Any) -> Raw:
    return Raw(DIGITS, {"all": Images(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels)})


TRAIN_OR_NOT = {"train": {"train": True}, "test": {"train": False}}
SPLITS = {"train": {"split": "train"}, "test": {"split": "test"}}


# ---------------------------------------------------------------------------------------------- ImageNet at 16 pixels

PIXELS = 16
ARRAY_PARTS = ("_reconstruct", "ndarray", "dtype", "scalar")


class _ArraysOnly(pickle.Unpickler):
    """Reads what the batches hold, numpy arrays in plain containers, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0] == "numpy" and name in ARRAY_PARTS) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def _load_imagenet16(classes: int) -> Callable[[Path, int | None], Raw]:
    """The first `classes` classes of downsampled ImageNet (Chrabaszcz et al. 2017), batches of pickled arrays."""

    def load(root: Path, image_size: int | None) -> Raw:
        folder = root / "imagenet16"
        if (folder / "train").is_dir():
            return load_folders(folder, image_size)
        train = [_read_batch(folder / f"train_data_batch_{number}", classes) for number in range(1, 11)]
        joined = Images(*(np.concatenate(arrays) for arrays in zip(*train, strict=True)))
        names = tuple(f"{number:04d}" for number in range(1, classes + 1))
        return Raw(names, {"train": joined, "test": _read_batch(folder / "val_data", classes)})

    return load


def _read_batch(path: Path, classes: int) -> Images:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
        images, labels = np.asarray(batch["data"]), np.asarray(batch["labels"], dtype=np.int64)
        images = images.reshape(-1, 3, PIXELS, PIXELS).transpose(0, 2, 3, 1).astype(np.uint8, casting="same_kind")
    except OSError as error:
        what = f"cannot read {path}: {error.strerror or error}"
        raise InputError(
            f"{what}; imagenet16 is not downloaded: put its train_data_batch_1..10 and val_data there"
        ) from None
    except Exception as error:
        raise InputError(f"{path} is damaged, or no batch of 16x16 images ({error})") from None
    if len(images) != len(labels) or labels.min() < 1 or labels.max() > 1000:
        raise InputError(f"{path} holds {len(images)} images and {len(labels)} labels, which must be 1 to 1000")
    kept = labels <= classes
    return Images(np.ascontiguousarray(images[kept]), labels[kept] - 1)


# ---------------------------------------------------------------------------------------------- specifications

DATASETS.register("digits")(
    DatasetSpec(
        "8x8 handwritten digits from scikit-learn, no download: the demo", _load_digits, (0.305,), (0.376,), flip=False
    )
)
DATASETS.register("cifar10")(
    DatasetSpec(
        "32x32 photographs, 10 classes, 60,000 images",
        _from_torchvision("CIFAR10", "cifar10", _read_cifar, parts=TRAIN_OR_NOT),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    )
)
DATASETS.register("cifar100")(
    DatasetSpec(
        "32x32 photographs, 100 classes, 60,000 images",
        _from_torchvision("CIFAR100", "cifar100", _read_cifar, parts=TRAIN_OR_NOT),
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
    )
)
DATASETS.register("svhn")(
    DatasetSpec(
        "32x32 house numbers, 10 classes, 99,289 images; needs scipy",
        _from_torchvision("SVHN", "svhn", _read_svhn, parts=SPLITS),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        flip=False,
    )
)
DATASETS.register("mnist")(
    DatasetSpec(
        "28x28 handwritten digits, grey, 70,000 images",
        _from_torchvision("MNIST", "mnist", _read_mnist, parts=TRAIN_OR_NOT),
        (0.1307,),
        (0.3081,),
        flip=False,
    )
)
DATASETS.register("fashionmnist")(
    DatasetSpec(
        "28x28 pieces of clothing, grey, 10 classes, 70,000 images",
        _from_torchvision("FashionMNIST", "fashionmnist", _read_mnist, parts=TRAIN_OR_NOT),
        (0.2860,),
        (0.3530,),
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
