"""Remove the folders of the author from the description of a network, for files that others may get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from repan_cli.checkpoint.card import ModelCard
from repan_cli.config.conventions import DATA_ROOT, PLACE_OF_DATA, PLACES
from repan_cli.system.text import from_home, last_part

NAMED_AGAIN = ("model.name", "block.name")
"""Settings that may name a user's own file, which has to be given again."""


def for_others(card: ModelCard, *, keeps_place: bool = True) -> ModelCard:
    """Return the description without the names of its author's folders.

    With `keeps_place` the location of the data is kept, so that it is found again on the same machine; in the home
    folder it begins with '~'. Every other absolute path is cut to its last part.
    """
    structure = card.structure
    changes = tuple(change._replace(family=_below_home(change.family)) for change in structure.changes)
    native = {key: _below_home(value) for key, value in structure.native.items()}
    kept = (*NAMED_AGAIN, DATA_ROOT) if keeps_place else NAMED_AGAIN
    return replace(
        card,
        model=_below_home(card.model),
        block=_below_home(card.block),
        structure=replace(structure, changes=changes, native=native),
        config={key: (_below_home if key in kept else last_part)(value) for key, value in card.settings.items()},
        surroundings=None if card.surroundings is None else _surroundings(card.surroundings, keeps_place=keeps_place),
        teachers=card.teachers and {last_part(name): digest for name, digest in card.teachers.items()},
    )


def _surroundings(noted: Mapping[str, Any], *, keeps_place: bool) -> dict[str, Any]:
    left = {key: value for key, value in noted.items() if key not in (PLACES, PLACE_OF_DATA)}
    places = noted.get(PLACES)
    place = places.get(DATA_ROOT) if isinstance(places, Mapping) else noted.get(PLACE_OF_DATA)
    return {**left, PLACES: {DATA_ROOT: _below_home(place)}} if keeps_place and place else left


def _below_home(value: Any) -> Any:
    return from_home(value) if isinstance(value, str) else value
