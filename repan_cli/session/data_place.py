"""The place of a run's data, found again from another folder than the one that the run began in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repan_cli.checkpoint.card import ModelCard
from repan_cli.config.settings import Config, DataConfig

KEY = "data_root"
WITHOUT_FILES = ("digits", "synthetic")


def noted(config: Config) -> dict[str, str]:
    """Return what a checkpoint notes beside a relative `data.root`: the same as an absolute path."""
    data = config.data
    if data.name in WITHOUT_FILES or Path(data.root).is_absolute():
        return {}
    return {KEY: str(Path(data.root).absolute())}


def found(card: ModelCard) -> str:
    """Return where the data of a network lie: as was typed, or, where they are not there, as was noted."""
    typed = str(card.config.get("data.root") or DataConfig().root)
    before: Any = (card.surroundings or {}).get(KEY)
    name = str(card.config.get("data.name"))
    if isinstance(before, str) and not _place(typed, name).exists() and _place(before, name).exists():
        return before
    return typed


def _place(root: str, name: str) -> Path:
    return Path(root) if name == "folder" else Path(root) / name
