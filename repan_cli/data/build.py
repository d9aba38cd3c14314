"""Choose a loader for each part of a data set: in memory if possible, else streaming."""

from __future__ import annotations

from typing import Any

from repan_cli import config
from repan_cli.data.batches import Augmentation, Loader
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.preprocess import MiddleCrop
from repan_cli.data.streaming import StreamingLoader, default_workers
from repan_cli.data.types import ArrayImages, Dataset, Part
from repan_cli.errors import InputError
from repan_cli.system.device import Runtime


def train_loader(dataset: Dataset, data: config.DataConfig, machine: Runtime) -> Loader:
    """Return a loader of augmented training images.

    Raises InputError if the augmentation would leave nothing of an image.
    """
    if data.cutout >= dataset.image_size:
        raise InputError(f"data.cutout={data.cutout} may blank whole images of {dataset.image_size} pixels")
    options = _options(dataset, machine, augmentation=_augmentation(dataset, data), classes=len(dataset.classes))
    if isinstance(dataset.train, ArrayImages) and data.augment not in config.POLICIES:
        return InMemoryLoader(dataset.train, **options)
    return _streamed(
        dataset, dataset.train, machine, data.workers, policy_of=dataset.policy, skip=data.on_error == "skip", **options
    )


def eval_loader(
    dataset: Dataset, part: str, machine: Runtime, workers: int | None = None, crop: MiddleCrop | None = None
) -> Loader:
    """Return a loader of the unchanged images of a part, for scoring.

    Resized images are cropped by `crop`, or in the usual way if it is None.
    """
    images, options = dataset.part(part), _options(dataset, machine)
    if isinstance(images, ArrayImages):
        return InMemoryLoader(images, **options)
    return _streamed(dataset, images, machine, workers, crop=crop, **options)


def _options(dataset: Dataset, machine: Runtime, **more: Any) -> dict[str, Any]:
    look = {"mean": dataset.mean, "std": dataset.std}
    place = {"device": machine.device, "memory_format": machine.memory_format}
    return {**look, **place, "rank": machine.rank, "ranks": machine.ranks, **more}


def _streamed(dataset: Dataset, part: Part, machine: Runtime, workers: int | None, **options: Any) -> Loader:
    return StreamingLoader(
        part,
        resized=not isinstance(part, ArrayImages),
        size=dataset.image_size,
        workers=default_workers(machine.device) if workers is None else workers,
        **options,
    )


def _augmentation(dataset: Dataset, data: config.DataConfig) -> Augmentation:
    if data.augment == "none":
        padding, flip, least_area = 0, False, 1.0
    else:
        padding = dataset.image_size // 8 if data.crop_padding is None else data.crop_padding
        flip, least_area = dataset.flip, data.crop_area
    return Augmentation(
        padding=padding,
        flip=flip,
        policy=data.augment if data.augment in config.POLICIES else None,
        cutout=data.cutout,
        erase=data.erase,
        mixup=data.mixup,
        cutmix=data.cutmix,
        least_area=least_area,
        random_crop=data.augment != "none",
    )
