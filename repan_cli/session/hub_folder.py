"""Read folders of the Hub, remote or local: weights, and a `config.json` that names their network."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repan_cli import checkpoint
from repan_cli.config.conventions import CROP_MODES, INTERPOLATIONS
from repan_cli.config.names import REPOSITORY, TIMM, of_timm
from repan_cli.errors import InputError
from repan_cli.system.notices import warn
from repan_cli.system.text import first_line
from repan_cli.system.weight_files import HUB_CONFIG, HUB_WEIGHTS, file_in

LONGEST = 2**24
"""The largest description in bytes, enough for the names of 100,000 classes."""


@dataclass(frozen=True)
class Described:
    """The content of a `config.json`. None stands for a fact that is not given.

    `network` is the full name of a timm network. `images` is its preprocessing: input_size, mean, std, crop_pct,
    crop_mode, interpolation.
    """

    network: str
    images: Mapping[str, Any]
    classes: tuple[str, ...] | None


def fetched(source: str) -> str:
    """Return the source; a name on the Hub is replaced by the folder into which its files were downloaded.

    If the network connection is down, files that were downloaded before come from huggingface_hub's cache. Raises
    InputError, with the reason, for a repository that cannot be downloaded or holds no network.
    """
    named = REPOSITORY.fullmatch(source)
    if named is None:
        return source
    from huggingface_hub import errors, hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would print every attempt
    name, revision = named["name"], named["revision"]
    try:
        config = Path(hf_hub_download(name, HUB_CONFIG, revision=revision))
        for weights in HUB_WEIGHTS:
            try:
                hf_hub_download(name, weights, revision=revision)
            except errors.EntryNotFoundError:
                continue
            return f"{config.parent}{named['key'] or ''}"
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"cannot fetch {source}: the Hub cannot be reached ({first_line(error)})") from error
    except errors.EntryNotFoundError as error:
        raise InputError(
            f"{source} holds no {HUB_CONFIG} that names its network: download its weights, and give --model NAME"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot fetch {source} ({first_line(error)}); for a private repository, run 'hf auth login' first"
        ) from error
    raise InputError(f"{source} holds none of {', '.join(HUB_WEIGHTS)}")


def file_of(source: str) -> str:
    """Return the file of weights, with its key, if a source is a folder or a name on the Hub.

    Any other source is returned unchanged.
    """
    source = fetched(source)
    path, key = checkpoint.split_key(source)
    if not path.is_dir():
        return source
    return f"{file_in(path)}::{key}" if key else str(file_in(path))


def described(weights: Path) -> Described | None:
    """Read the description next to a file of weights; return None if it does not describe a timm network."""
    file = weights.parent / HUB_CONFIG
    if not file.is_file() or file.stat().st_size > LONGEST:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{file} cannot be read ({type(error).__name__}): its description of {weights.name} is ignored")
        return None
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or architecture not in of_timm():
        return None
    images = content.get("pretrained_cfg")
    images = images if isinstance(images, dict) else content
    kept = {name: images[name] for name, fits in FITS.items() if name in images and fits(images[name])}
    return Described(TIMM + architecture, kept, _classes(content, images))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any, *lengths: int) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(_is_number, value))


FITS: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda value: (
        _numbers(value, 3) and all(isinstance(side, int) and 0 < side < 2**16 for side in value)
    ),
    "mean": lambda value: _numbers(value, 1, 3),
    "std": lambda value: _numbers(value, 1, 3) and all(each > 0 for each in value),
    "crop_pct": lambda value: _is_number(value) and 0 < value <= 1,
    "crop_mode": lambda value: isinstance(value, str) and value in CROP_MODES,
    "interpolation": lambda value: isinstance(value, str) and value in INTERPOLATIONS,
}
"""The facts that are read from a description, each with a check of its type."""


def _classes(*places: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names: timm's `label_names`, or transformers' `id2label`."""
    for content in places:
        names = content.get("label_names")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        by_number = content.get("id2label")
        if isinstance(by_number, dict) and {str(number) for number in range(len(by_number))} == by_number.keys():
            return tuple(str(by_number[str(number)]) for number in range(len(by_number)))
    return None
