"""Choose parts of a data set: its first classes, the first images of each class, a stratified validation part."""

from __future__ import annotations

import dataclasses

import numpy as np

from repan_cli.data.types import ArrayImages, Labels, Mask, Part, RawDataset
from repan_cli.errors import InputError


def first_classes(name: str, raw: RawDataset, count: int) -> RawDataset:
    """Keep only the first `count` classes by name, and renumber them in that order."""
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
    return raw._replace(classes=tuple(raw.classes[number] for number in chosen), parts=parts)


def _renumbered(part: Part, numbers: Labels) -> Part:
    """Keep the images whose class has a new number in `numbers` (classes,); -1 drops the class."""
    kept = part.take(numbers[part.labels] >= 0)
    labels = numbers[kept.labels]
    return kept._replace(labels=labels) if isinstance(kept, ArrayImages) else dataclasses.replace(kept, labels=labels)


def first_images(raw: RawDataset, count: int) -> RawDataset:
    """Keep at most the first `count` training images of each class; leave the other parts as they are."""
    train = raw.parts["train"]
    return raw._replace(parts={**raw.parts, "train": train.take(first_of_each(train.labels, count))})


def stratified(labels: Labels, fraction: float, seed: int) -> Mask:
    """Return a mask (N,), drawn by `seed`, that holds out `fraction` of every class: at least one image, never all."""
    mask = np.zeros(len(labels), dtype=bool)
    for members in _by_class(labels, np.random.default_rng(seed).permutation(len(labels))):
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[members[:count]] = True
    return mask


def _by_class(labels: Labels, order: Labels) -> list[Labels]:
    """Return the numbers of the images of each class that there is, in the given order, after one sort for all."""
    grouped = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    return np.split(grouped, np.cumsum(counts)[:-1])


def first_of_each(labels: Labels, count: int) -> Mask:
    """Return a mask (N,) of the first `count` images of every class."""
    mask = np.zeros(len(labels), dtype=bool)
    for members in _by_class(labels, np.arange(len(labels))):
        mask[members[:count]] = True
    return mask
