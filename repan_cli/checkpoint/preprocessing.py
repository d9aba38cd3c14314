"""Describe a network's preprocessing in a file, for programs that do not know repan.

The keys have timm's names where timm has one. `docs/deploy.md` shows a script that applies them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from repan_cli.checkpoint.card import ModelCard
from repan_cli.config.conventions import BORDER, CENTER, CROP_SHARE, INTERPOLATION, SQUASH, is_resized
from repan_cli.system.files import to_json

SQUARE = "square"
"""The crop mode for networks with small images: the largest square in the middle, resized to the network's side."""

WHOLE = "box"
"""The filter of that mode for pictures whose sides are both multiples of the network's side."""

COLORS = {1: "L", 3: "RGB"}
"""Pillow's modes, by the number of channels."""


def preprocessing(card: ModelCard) -> dict[str, Any]:
    """Return the steps from a picture to a network's input, in plain types.

    `mean` and `std` are those that the caller has to apply: 0 and 1 if the network normalizes. `fill` is the border
    color of the crop mode that has a border, each channel from 0 to 255.
    """
    resized = is_resized(card.settings.get("data.crop", "auto"), card.image_size)
    mode = (card.crop_mode or CENTER) if resized else SQUARE
    share = (card.crop_share or CROP_SHARE) if resized else 1.0
    channels = card.in_chans
    found = {
        "input_size": [channels, card.image_size, card.image_size],
        "color_order": COLORS.get(channels, f"{channels} channels"),
        "value_range": [0.0, 1.0],
        "mean": [0.0] * channels if card.normalizes else list(card.mean),
        "std": [1.0] * channels if card.normalizes else list(card.std),
        "crop_mode": mode,
        "resize_size": math.floor(card.image_size / share),
        "crop_pct": share,
        "interpolation": (card.interpolation or INTERPOLATION) if resized else INTERPOLATION,
        "classes": list(card.classes),
    }
    if mode == SQUARE:
        found["interpolation_whole"] = WHOLE
    if mode == BORDER:
        found["fill"] = [round(255 * value) for value in card.mean]
    return found | {"preprocessing": _in_words(found)}


def as_texts(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the steps as strings by name, for formats that hold only strings: numbers and lists become JSON."""
    return {name: value if isinstance(value, str) else to_json(value) for name, value in found.items()}


def _in_words(found: Mapping[str, Any]) -> str:
    """Describe the steps in English."""
    side, resized, filter_ = found["input_size"][1], found["resize_size"], found["interpolation"]
    middle, whole = f"take the middle {side}x{side}", found.get("interpolation_whole")
    steps = {
        SQUARE: f"take the largest square in the middle and resize it to {side}x{side}, {whole} where "
        f"width and height are both multiples of {side}, else {filter_}, as Pillow's ImageOps.fit",
        CENTER: f"resize the shorter side to {resized}, {filter_}, the longer one in proportion, rounded down; "
        f"{middle}",
        SQUASH: f"resize to {resized}x{resized}, {filter_}; {middle}",
        BORDER: f"resize the longer side to {resized}, {filter_}, the shorter one in proportion; {middle}, "
        f"with a border of the color {found.get('fill')} where it is smaller",
    }[found["crop_mode"]]
    plain = not any(found["mean"]) and set(found["std"]) == {1.0}
    last = "" if plain else ", less mean, over std"
    return (
        f"turn the picture upright by its EXIF tag; convert it to {found['color_order']}, as Pillow does; {steps}; "
        f"divide by 255{last}; order channels, rows, columns"
    )
