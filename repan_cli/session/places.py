"""Find the files and folders that a run's settings name, when the run continues from another working directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repan_cli.checkpoint.card import ModelCard
from repan_cli.config.conventions import DATA_ROOT, PLACE_OF_DATA, PLACES
from repan_cli.config.settings import Config, DataConfig, flatten
from repan_cli.system.text import at_home
from repan_cli.system.weight_files import split_key

READ_AGAIN = (DATA_ROOT, "data.class_order", "teacher.name", "baseline.teacher.name")
"""The settings whose files are read again when a run is resumed. A user's own code is never looked for."""

WITHOUT_FILES = ("digits", "synthetic")


def noted(config: Config) -> dict[str, Any]:
    """Return what a run notes besides its settings: the absolute path of each relative one, by key."""
    found = {key: str(Path(path).absolute()) for key, path in _relative(config)}
    return {PLACES: found} if found else {}


def _relative(config: Config) -> Iterator[tuple[str, str]]:
    settings = flatten(config)
    for key in READ_AGAIN:
        path = settings.get(key)
        if not isinstance(path, str) or Path(path).is_absolute():
            continue
        if key == DATA_ROOT:
            if config.data.name not in WITHOUT_FILES:
                yield key, path
        elif split_key(path)[0].exists():  # otherwise it is the name of a network, or a word
            yield key, path


def found(settings: Mapping[str, Any], places: Mapping[str, Any] | None) -> dict[str, str]:
    """Return new paths for settings whose file is missing at the given path, but exists at the noted one.

    Args:
        settings: typed values by dotted key.
        places: what was noted; for a file, the `surroundings` in its card.
    """
    before = (places or {}).get(PLACES)
    before = {**before} if isinstance(before, Mapping) else {}
    before |= {DATA_ROOT: places[PLACE_OF_DATA]} if places and PLACE_OF_DATA in places else {}
    name = str(settings.get("data.name"))
    noted_at = {key: at_home(path) for key, path in before.items() if key in READ_AGAIN and isinstance(path, str)}
    return {
        key: path
        for key, path in noted_at.items()
        if settings.get(key) is not None
        and not _file(key, str(settings[key]), name).exists()
        and _file(key, path, name).exists()
    }


def data_root(card: ModelCard) -> str:
    """Return the folder of a network's data: the one that was given or, if the data are not there, the noted one."""
    typed = {DATA_ROOT: DataConfig().root, **{key: value for key, value in card.settings.items() if value is not None}}
    return found(typed, card.surroundings).get(DATA_ROOT, at_home(str(typed[DATA_ROOT])))


def _file(key: str, path: str, name: str) -> Path:
    """Return the file or folder that a setting needs."""
    if key == DATA_ROOT:
        return Path(at_home(path)) if name == "folder" else Path(at_home(path)) / name
    return split_key(path)[0]
