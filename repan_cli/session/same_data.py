"""Check that data are those of a file: its classes, its images, and which of them were held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repan_cli.checkpoint.card import ModelCard
from repan_cli.data.types import Dataset
from repan_cli.errors import InputError
from repan_cli.system.text import quoted

TITLES = {"train": "training", "val": "validation", "test": "test"}


def check_classes(source: object, classes: Sequence[str], dataset: Dataset) -> None:
    """Check that a checkpoint has the classes of the data set. Raises InputError if not."""
    if tuple(classes) == tuple(dataset.classes):
        return
    if len(classes) != len(dataset.classes):
        counts = f"{source} knows {len(classes)} classes, {dataset.name} has {len(dataset.classes)}"
        raise InputError(f"{counts}: give the data it was trained on")
    first = next((a, b) for a, b in zip(classes, dataset.classes, strict=True) if a != b)
    raise InputError(
        f"{source} and {dataset.name} name their classes differently, such as '{first[0]}' and '{first[1]}'"
    )


def check_images(card: ModelCard, dataset: Dataset, last: Path) -> None:
    """Check that a resumed run goes on with the images that it began with, in their order.

    `last` is the file of its weights, for the advice. Files of earlier versions tell only the labels of the images, not
    their names. Raises InputError if images differ.
    """
    new = f"or begin another run from its weights with --init {quoted(last)}"
    if card.labels_digest != dataset.labels_digest:
        raise InputError(
            f"the images of {dataset.name} are not those that the run began with: some were added, removed or moved; "
            f"bring them back, {new}"
        )
    before, now = card.names_digests or {}, dataset.names_digests
    if other := [TITLES[part] for part in before if now.get(part, before[part]) != before[part]]:
        raise InputError(
            f"{' and '.join(other)} images of {dataset.name} have other names than when the run began, so their order "
            f"and the parts drawn by it differ: give them their names back, {new}"
        )


def is_split_otherwise(card: ModelCard, dataset: Dataset) -> bool:
    """Return whether a network was trained with images that are held out now, or the reverse.

    Parts are drawn by the order of the images, which is that of their names.
    """
    if card.split_digest != dataset.split_digest:
        return True
    before, now = (names.get("train") for names in (card.names_digests or {}, dataset.names_digests))
    return bool(card.split_digest) and None not in (before, now) and before != now
