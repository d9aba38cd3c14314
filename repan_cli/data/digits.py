"""Load the handwritten digits that come with scikit-learn, the demo's data."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from repan_cli.data.subset import stratified
from repan_cli.data.types import ArrayImages, RawDataset, ReadOptions
from repan_cli.system.packages import need

DIGITS = tuple(str(digit) for digit in range(10))


def load(root: Path, reading: ReadOptions) -> RawDataset:
    """Return all images, with a fixed test part."""
    pixels, labels = pixels_and_labels()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)[..., None]
    labels = labels.astype(np.int64)
    test = stratified(labels, 0.2, seed=0)
    whole = ArrayImages(images, labels)
    return RawDataset(DIGITS, {"train": whole.take(~test), "test": whole.take(test)})


def check() -> None:
    """Raise InputError if the package that holds the images is missing; import nothing."""
    need("the data set digits", "sklearn")


def pixels_and_labels() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the images, (1797, 8, 8), and their labels, read once in a process: they must not be changed.

    The file is read directly, since importing scikit-learn takes a second.
    """
    check()
    return _read()


@cache
def _read() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    found = importlib.util.find_spec("sklearn")
    places = found.submodule_search_locations if found else None
    file = Path(next(iter(places or ("",)))) / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images, bunch.target
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
