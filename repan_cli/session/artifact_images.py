"""Load images for a network: the data set it was trained on, or some of its images for checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repan_cli import config, export
from repan_cli.checkpoint.card import ModelCard
from repan_cli.config.conventions import SPLITS
from repan_cli.data import class_folders, datasets
from repan_cli.data.image_files import UnreadableImageError
from repan_cli.data.types import ArrayImages, Dataset
from repan_cli.errors import InputError
from repan_cli.models import probe
from repan_cli.session import places
from repan_cli.session.artifact import Artifact, are_of_imagenet
from repan_cli.session.same_data import check_classes, is_split_otherwise
from repan_cli.system.notices import warn
from repan_cli.system.text import first_line


def load(
    artifact: Artifact,
    dataset: str | None = None,
    root: str | None = None,
    *,
    split: str | None = None,
    order: str | None = None,
) -> Dataset:
    """Load the data set that a network names, or the one asked for, split and prepared as the network expects.

    For image folders without a training part, only the part `split` is loaded, with the classes of the file. `order`
    tells which class each output means, if the file does not: as the setting `data.class_order`.

    Raises InputError if the network names no data set, or the classes are not those of the network.
    """
    card = artifact.card
    if dataset is not None:
        dataset, root = config.data_given(dataset, root)
    if dataset is None and not card.knows_its_data:
        raise InputError(f"{artifact.source} does not say which data it is for: give --dataset and --data-root")
    arguments = settings(artifact, dataset, root)
    folder = Path(arguments["root"])
    parts = class_folders.part_folders(folder) if arguments["name"] == "folder" and folder.is_dir() else {}
    has_part = split in parts or (split == "test" and "val" in parts)
    alone = bool(parts) and split is not None and ("train" not in parts or (has_part and not card.knows_its_data))
    if order is not None:
        arguments["class_order"] = order
    elif parts and _are_known(card, [*parts.values()], alone=alone):
        arguments["class_order"] = card.classes
    data = datasets.load(**arguments, only=split if alone else None)
    prepared = artifact.preparation
    data = dataclasses.replace(data, mean=prepared.mean, std=prepared.std)
    _check(artifact, data, told=order is not None)
    if card.knows_its_data and not alone and is_split_otherwise(card, data):
        warn(
            f"the images held out of this data are not those held out for {artifact.source}: some of them may be its "
            "training images"
        )
    return data


def _are_known(card: ModelCard, folders: Sequence[Path], *, alone: bool) -> bool:
    """Return whether a network predicts the classes of these folders, in any order; a part alone may lack some."""
    if card.knows_its_data:
        return alone
    names, known = class_folders.class_folders(folders[0]).keys(), set(card.classes)
    return names <= known if alone else names == known


def _check(artifact: Artifact, data: Dataset, *, told: bool) -> None:
    """Check that data have the classes of a network: their number and, if known, their names.

    A network that does not know its data may use other names, or none. The order of the classes is then a guess, and a
    warning says so.
    """
    card = artifact.card
    if card.knows_its_data:
        check_classes(artifact.source, card.classes, data)
        return
    if len(card.classes) != len(data.classes):
        counts = f"{artifact.source} knows {len(card.classes)} classes, {data.name} has {len(data.classes)}"
        raise InputError(f"{counts}: give data with the same classes")
    if told or data.name != "folder" or tuple(card.classes) == data.classes or are_of_imagenet(data.classes):
        return
    text, numbered = data.classes, sorted(data.classes, key=class_folders.natural)
    if [*card.classes] == [str(number) for number in range(len(text))]:
        why = f"{artifact.source} does not name its classes"
    else:
        why = f"{artifact.source} names its classes differently ('{card.classes[0]}', not '{text[0]}')"
    taken = f"its outputs are assumed to be the folders in the order {', '.join(text[:3])}, ..."
    other = f" (by number they are {', '.join(numbered[:3])}, ...: --classes natural)" if numbered != [*text] else ""
    warn(f"{why}: {taken}{other}; --classes FILE gives another order, one name per line")


def settings(artifact: Artifact, dataset: str | None = None, root: str | None = None) -> dict[str, Any]:
    """Return the arguments of `datasets.load` for a network's data, with the name or the folder replaced if given.

    Only a data set that the user names may be downloaded, since a file may come from anybody. Raises InputError for
    settings in a file that this version does not know.
    """
    card = artifact.card
    stored = {key: config.as_text(value) for key, value in card.settings.items() if key.startswith("data.")}
    try:
        typed = config.typed(stored)
    except InputError as error:
        raise InputError(f"{artifact.source} describes its data with {first_line(error)}") from None
    arguments = datasets.settings_of(config.replace(config.Config(), typed).data) | {"root": places.data_root(card)}
    arguments |= {"download": dataset is not None, "known_split": card.split_digest}
    asked = {"name": dataset, "root": root, "image_size": card.image_size, "channels": card.in_chans}
    if dataset not in (None, arguments["name"]):  # its choice of classes belongs to its own data
        arguments |= {"classes": None, "per_class": None}
    return {**arguments, **{name: value for name, value in asked.items() if value is not None}}


def noise(artifact: Artifact, count: int = export.PROOF_IMAGES) -> Tensor:
    """Return random images, (count, C, H, W), with the mean and variance that the network expects."""
    prepared = artifact.preparation
    return probe.noise(count, prepared.channels, prepared.size, prepared.size)


def real_images(artifact: Artifact, root: str | None, count: int) -> tuple[Tensor | None, str]:
    """Read some images of a network's own data, (n, C, H, W), normalized. If there are none here, return None and the
    reason.

    From image folders, equally many images of each class are read, from the test part if there is one, and from at most
    `count` classes. Unreadable images are left out. Nothing is downloaded.
    """
    if not artifact.card.knows_its_data:
        return None, "its data are not known"
    arguments = settings(artifact, None, root)
    try:
        if arguments["name"] in places.WITHOUT_FILES:
            return _of_memory(artifact, arguments, count), ""
        folder = Path(arguments["root"])
        folder = folder if arguments["name"] == "folder" else folder / arguments["name"]
        if not folder.is_dir():
            return None, f"no {folder}; --data-root names another place"
        if class_folders.part_folders(folder):
            return _of_folders(artifact, folder, count), ""
        return _of_memory(artifact, arguments, count), ""
    except InputError as error:
        return None, str(error)


def _of_memory(artifact: Artifact, arguments: dict[str, Any], count: int) -> Tensor:
    part = datasets.load(**arguments).test
    numbers = range(min(count, len(part.labels)))
    if isinstance(part, ArrayImages):
        found = [torch.from_numpy(part.images[number]).permute(2, 0, 1) for number in numbers]
    else:
        found = [artifact.preparation.picture(part.read(int(part.index[number]))) for number in numbers]
    return artifact.preparation.normalized(torch.stack(found))


def _of_folders(artifact: Artifact, folder: Path, count: int) -> Tensor:
    parts = class_folders.part_folders(folder)
    part = next(parts[name] for name in SPLITS if name in parts)
    folders = [*class_folders.class_folders(part).values()][:count]
    each = max(1, count // len(folders))
    chosen = [path for folder in folders for path in class_folders.first_images(folder, each)]
    found, unreadable = [], None
    for path in chosen:
        try:
            found.append(artifact.preparation.file(path))
        except UnreadableImageError as error:  # one damaged image among good ones is no reason to use noise
            unreadable = error
    if unreadable is not None and not found:
        raise unreadable
    return torch.stack(found)
