"""Read the grid of a study: the arms of an experiment, each a command with settings laid over the shared ones.

A grid is a YAML file. `settings` holds what all arms share, and may name a preset as its `base`. Each entry of `arms`
describes the arm in one sentence (`about`), and lists its differences from the shared settings or from another arm
(`like`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from repan_cli.config.files import find_preset, flatten_tree, named_files, parse_tree, read_file
from repan_cli.config.renamed import as_given
from repan_cli.config.resolve import Resolved, resolve_layer
from repan_cli.config.schema import Layer
from repan_cli.config.settings import DECLARED
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import at_home

FOLDER = "studies"
"""The folder of the shipped grids, next to the folders of the presets."""

COMMANDS = ("cycle", "train", "distill")
ONLY_OF_CYCLES = ("cycle.", "baseline.")
KEYS = ("about", "settings", "arms", "seeds")
ARM_KEYS = ("about", "command", "control", "like", "settings")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


class Arm(NamedTuple):
    """One arm: the command that makes its runs, and its settings as text by dotted key."""

    name: str
    about: str
    command: str
    is_control: bool
    layer: Layer

    def read_by(self, given: Layer) -> dict[str, Any]:
        """Return those settings of the command line that this arm's command reads."""
        unread = {"cycle": (), "distill": ONLY_OF_CYCLES, "train": (*ONLY_OF_CYCLES, "teacher.")}[self.command]
        return {key: text for key, text in given.items() if not key.startswith(unread)}

    def resolve(self, given: Layer) -> Resolved:
        """Return the configuration of a run, with `given` on top. Raises InputError, which names the arm."""
        try:
            return resolve_layer(self.command, self.layer, self.read_by(given), source=self.name)
        except InputError as error:
            raise InputError("\n".join(f"arm {self.name}: {line}" for line in str(error).splitlines())) from None


@dataclass(frozen=True)
class Grid:
    """A study: its arms by name, in the order of the file, and the seeds of their runs."""

    path: Path
    about: str
    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]

    def matching(self, globs: str) -> list[Arm]:
        """Return the arms that comma-separated globs match, controls first.

        Raises InputError for a glob without a match.
        """
        chosen: dict[str, Arm] = {}
        for glob in globs.split(","):
            found = {name: arm for name, arm in self.arms.items() if fnmatchcase(name, glob.strip())}
            if not found:
                hint = did_you_mean(glob, self.arms) or f"; there are {', '.join(self.arms)}"
                raise InputError(f"no arm '{glob}' in {self.path}{hint}")
            chosen |= found
        return sorted(chosen.values(), key=lambda arm: not arm.is_control)


def grids() -> dict[str, Path]:
    """Return the grids that ship with repan, by name."""
    return {name.removeprefix(f"{FOLDER}/"): path for name, path in named_files() if name.startswith(f"{FOLDER}/")}


def find_grid(name: str) -> Path:
    """Return the file that `name` means: a path, or the name of a shipped grid. Raises InputError."""
    name = at_home(name)
    if Path(name).is_file():
        return Path(name)
    shipped = grids()
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped) or f"; with repan come {', '.join(shipped)}"
    raise InputError(f"no grid file '{name}'{hint}")


def read_grid(path: Path) -> Grid:
    """Read a grid. Raises InputError, in one line, for a file that is not a grid, an unknown key, or arms that refer to
    each other in a circle.
    """
    try:
        tree = parse_tree(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    _check_keys(tree, KEYS, str(path))
    entries = _mapping(tree.get("arms"), f"{path}: arms")
    if not entries:
        raise InputError(f"{path}: no arms: name at least one under 'arms'")
    shared = _shared(path, _mapping(tree.get("settings"), f"{path}: settings"))
    arms = {name: _arm(path, name, entries, shared) for name in entries}
    return Grid(
        path, str(tree.get("about", "")), arms, parse_seeds(tree.get("seeds", ["0", "1", "2"]), f"{path}: seeds")
    )


def parse_seeds(words: Any, source: str) -> tuple[int, ...]:
    """Return the numbers in a list of strings. Raises InputError for other text, and for a repeated seed."""
    if not isinstance(words, list) or not words or not all(re.fullmatch(r"\d{1,9}", str(word)) for word in words):
        raise InputError(f"{source}: expected numbers such as 0, 1, 2")
    numbers = tuple(int(word) for word in words)
    if len(set(numbers)) < len(numbers):
        raise InputError(f"{source}: a seed is given twice")
    return numbers


def _shared(path: Path, settings: dict[str, Any]) -> Layer:
    base = settings.pop("base", None)
    below = read_file(find_preset(str(base), near=path)) if base else {}
    return {**below, **as_given(flatten_tree(settings), source=str(path))}


def _arm(path: Path, name: str, entries: Mapping[str, Any], shared: Layer) -> Arm:
    if not NAME.fullmatch(name):
        raise InputError(f"{path}: arm '{name}': a name of letters, digits, '_', '-', '+' and '.' is needed")
    layer, command = dict(shared), "cycle"
    about, control = "", False
    for entry, where in reversed([*_line_of(path, name, entries)]):
        own = flatten_tree(_mapping(entry.get("settings"), f"{where}: settings"))
        layer |= as_given(own, source=str(path), where=where)
        command = str(entry.get("command", command))
        about, control = str(entry.get("about", "")), _flag(entry.get("control", "false"), where)
    if command not in COMMANDS:
        raise InputError(f"{path}: arm {name}: command: '{command}' is not one of {', '.join(COMMANDS)}")
    return Arm(name, about, command, control, layer)


def _line_of(path: Path, name: str, entries: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield an arm's entry, then the entry of the arm it is like, and so on, each with its place."""
    seen: list[str] = []
    while name:
        if name in seen:
            raise InputError(f"{path}: arm {seen[0]}: 'like' leads back to {name}")
        if name not in entries:
            raise InputError(f"{path}: arm {seen[-1]}: like: no arm '{name}'{did_you_mean(name, entries)}")
        seen.append(name)
        where = f"{path}: arm {name}"
        entry = _mapping(entries[name], where)
        _check_keys(entry, ARM_KEYS, where)
        yield entry, where
        name = str(entry.get("like", ""))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected 'key: value' lines")
    return dict(value)


def _flag(text: Any, where: str) -> bool:
    if text not in ("true", "false"):
        raise InputError(f"{where}: control: expected true or false")
    return bool(text == "true")


def _check_keys(tree: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in known:
            is_setting = key.partition(".")[0] in {name.partition(".")[0] for name in DECLARED}
            belongs = "; it belongs below 'settings:'" if is_setting else ""
            belongs = "; it belongs into an arm" if key == "command" else belongs
            hint = belongs or did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key '{key}'{hint}")
