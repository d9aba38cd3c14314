"""Read the data sets that timm opens by names such as `hfds/ORG/NAME` and `torch/NAME`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from repan_cli.config.conventions import DATASET_PREFIXES, LARGE_IMAGE
from repan_cli.data.image_files import as_mode, failure, is_of_network
from repan_cli.data.types import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PREFIXES,
    DatasetSpec,
    Labels,
    LazyImages,
    Part,
    RawDataset,
    ReadOptions,
)
from repan_cli.errors import OUT_OF_REACH, InputError, OutOfReachError
from repan_cli.system.notices import warn
from repan_cli.system.text import first_line

IN_ORDER = DATASET_PREFIXES[2:]
"""Data sets of timm that can only be read sequentially: no part can be held out, and no epoch repeated."""


class _TimmReader:
    """Reads the pictures of one of timm's or torchvision's data sets by number."""

    def __init__(self, dataset: Any, channels: int) -> None:
        self.dataset, self.channels = dataset, channels

    def __call__(self, index: int) -> Image.Image:
        try:
            return as_mode(self.dataset[index][0], self.channels)
        except (MemoryError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise failure(error, self._numbered(index)) from None

    def name(self, index: int) -> str:
        return f"image {self._numbered(index)}"

    def names(self, index: npt.NDArray[np.int64]) -> Iterator[bytes] | None:
        """Return the last two parts of the images' paths; on the Hub, where names may be missing, also their bytes."""
        samples, reader = getattr(self.dataset, "samples", None), getattr(self.dataset, "reader", None)
        if samples is not None:  # torchvision's folders
            return (_last_parts(samples[number][0]) for number in index.tolist())
        table = getattr(reader, "dataset", None)
        return None if table is None or reader is None else _names_in_table(table, reader.image_key, index)

    def _numbered(self, index: int) -> str:
        return f"{index} of {type(self.dataset).__name__}"


def _last_parts(path: str) -> bytes:
    return os.fsencode("/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:]))


def _names_in_table(table: Any, key: str, index: npt.NDArray[np.int64]) -> Iterator[bytes] | None:
    """Return the name and the number of bytes of images of a Hugging Face data set, without reading the images."""
    import pyarrow
    from pyarrow import compute

    column = table.data.column(key)
    if getattr(table, "_indices", None) is not None or not pyarrow.types.is_struct(column.type):
        return None
    paths = compute.struct_field(column, "path").to_pylist()
    sizes = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
    return (b"%s %d" % (_last_parts(paths[number] or ""), sizes[number] or 0) for number in index.tolist())


def _load_timm(name: str) -> Callable[[Path, ReadOptions], RawDataset]:
    def load(root: Path, reading: ReadOptions) -> RawDataset:
        if not reading.download:
            raise InputError(f"{name} is opened by timm, which may download it: allow that with --dataset {name}")
        train = _timm_part(name, root, "train")
        others = {part: _timm_part(name, root, split) for part, split in (("val", "validation"), ("test", "test"))}
        if name.startswith("torch/"):
            others.pop("test" if others["val"] else "val")  # torchvision's have two parts
        found = {part: dataset for part, dataset in {"train": train, **others}.items() if dataset is not None}
        if len(found) < 2 or train is None:
            raise InputError(f"timm finds no training and validation part of {name} in {root}")
        classes, _ = _classes_and_labels(name, train)
        parts: dict[str, Part] = {}
        for part, dataset in found.items():
            _, labels = _classes_and_labels(name, dataset)
            if len(labels) and part != "train" and (labels < 0).all():
                warn(f"the {part} part of {name} has no labels and is not used")
                continue
            parts[part] = LazyImages(_TimmReader(dataset, reading.channels), labels, np.arange(len(labels)))
        if len(parts) < 2:
            raise InputError(f"{name} has no validation or test part with labels")
        return RawDataset(classes, parts)

    return load


def _timm_part(name: str, root: Path, split: str) -> Any:
    """Load one part of a timm data set; return None for a validation or test part that it does not have."""
    from timm.data import create_dataset

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(name, root=str(root), split=split, download=name.startswith("torch/"))
    except ImportError as error:
        raise InputError(f"{name} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:  # from timm, torchvision, datasets, or the network
        if _is_out_of_reach(error):
            raise OutOfReachError(
                f"the {split} part of {name} cannot be fetched ({first_line(error)}): try again"
            ) from None
        if split != "train":
            return None
        raise InputError(f"timm cannot open {name} in {root}: {first_line(error)}") from None


def _is_out_of_reach(error: Exception) -> bool:
    """Return whether a part may be there, but cannot be fetched now. Without it, other images would be scored."""
    if is_of_network(error) or isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and error.errno in OUT_OF_REACH


def _classes_and_labels(name: str, dataset: Any) -> tuple[tuple[str, ...], Labels]:
    """Return the class names, and the class numbers of the images, without reading the images."""
    table = getattr(getattr(dataset, "reader", None), "dataset", None)  # a Hugging Face data set
    if table is not None:
        key = dataset.reader.label_key
        classes, labels = getattr(table.features[key], "names", None), table[key]
    else:
        classes = getattr(dataset, "classes", None)
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None:
        raise InputError(f"{name} gives the labels only by reading its images, which is not supported")
    try:
        labels = np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} has labels that are not class numbers, such as '{labels[0]}': unpack it into class folders "
            "(--dataset folder)"
        ) from None
    return tuple(map(str, classes or range(labels.max() + 1))), labels


def _timm_spec(name: str) -> DatasetSpec:
    prefix = name.partition("/")[0]
    if prefix in IN_ORDER:
        raise InputError(
            f"{name} can only be read in order, so nothing could be held out or resumed: unpack it into class "
            "folders (--dataset folder), or use hfds/ for sets of the Hugging Face hub"
        )
    return DatasetSpec(f"timm's {name}", _load_timm(name), IMAGENET_MEAN, IMAGENET_STD, image_size=LARGE_IMAGE)


PREFIXES.update(dict.fromkeys(DATASET_PREFIXES, _timm_spec))
