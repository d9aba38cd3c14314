"""Complete arguments in the shell: names, settings and their values, runs and checkpoints.

A keypress must not wait for torch, so `config.names` reads names from tables and sources.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

from repan_cli import config
from repan_cli.config import names
from repan_cli.config.conventions import ARTIFACT_ENDINGS, FORMATS, INT8_TARGETS, SPLITS
from repan_cli.config.grid import grids as shipped_grids

DEEPEST, MOST = 4, 200
"""The number of levels below the typed folder in which files are sought, and the largest number of offers."""


def models(start: str = "") -> list[str]:
    """Offer short names and repan's networks; once a letter is typed, also other packages' networks, with and without
    prefix.
    """
    full = list(names.catalog())
    ours = [name for name in full if ":" not in name]
    short = [name.removesuffix("_cifar") for name in ours]
    if not start:
        return ["repvgg", *short, *ours, "timm:", "torchvision:"]
    return ["repvgg", *short, *full, *(name.removeprefix("timm:") for name in full if name.startswith("timm:"))]


def blocks() -> list[str]:
    return list(names.blocks())


def datasets() -> list[str]:
    return list(config.RECIPES)


def schedules() -> list[str]:
    from repan_cli.training.schedules import SCHEDULES

    return list(SCHEDULES)


def optimizers() -> list[str]:
    """Return the optimizers of the timm that is installed."""
    return list(names.optimizers()) or ["sgd", "adamw"]


def trackers() -> list[str]:
    from repan_cli.runs.trackers import TRACKERS

    return list(TRACKERS)


def kinds() -> list[str]:
    from repan_cli.commands.list_names import KINDS

    return list(KINDS)


def devices() -> list[str]:
    return ["auto", "cpu", "cuda", "cuda:0", "mps"]


def splits() -> list[str]:
    return list(SPLITS)


def formats() -> list[str]:
    return list(FORMATS)


def int8_targets() -> list[str]:
    return list(INT8_TARGETS)


def forms() -> list[str]:
    return ["conv", "conv-bn"]


def presets(start: str = "") -> list[str]:
    return [*config.presets(), *_files(start, (".yaml", ".yml"))]


def grids(start: str = "") -> list[str]:
    return [*shipped_grids(), *_files(start, (".yaml", ".yml"))]


def checkpoints(start: str = "") -> list[str]:
    return _files(start, ARTIFACT_ENDINGS)


def teachers(start: str = "") -> list[str]:
    return [config.PREVIOUS, *checkpoints(start), *(name for name in models(start) if ":" in name)]


def runs(start: str = "") -> list[str]:
    """Return 'latest', and the directories that hold a run, the newest first."""
    found = [Path(path).parent for path in _files(start or "runs/", ("config.yaml",))]
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return ["latest", *map(str, newest)]


def _files(start: str, endings: tuple[str, ...]) -> list[str]:
    """Return the files with these endings, in the folder that `start` begins with or some levels below it."""
    folder, found = start.rpartition("/")[0], []
    top = Path(folder + "/" if start.startswith("/") else folder or ".")
    for place, folders, files in os.walk(top):
        depth = len(Path(place).relative_to(top).parts)
        folders[:] = [] if depth >= DEEPEST else sorted(name for name in folders if not name.startswith("."))
        found += [str(Path(place) / name) for name in sorted(files) if name.endswith(endings) and name[0] != "."]
        if len(found) > MOST:
            break
    return [f"{'./' if start.startswith('./') else ''}{path}" for path in found[:MOST]]


NAMES: dict[str, Callable[..., list[str]]] = {
    "model.name": models,
    "model.init": checkpoints,
    "block.name": blocks,
    "data.name": datasets,
    "optim.name": optimizers,
    "optim.schedule": schedules,
    "teacher.name": teachers,
    "teacher.model": models,
    "run.device": devices,
    "run.trackers": trackers,
}
"""The values of a setting whose declaration does not list them, by its key."""


def values(key: str, start: str = "") -> list[str]:
    """Return the possible values after KEY=, if known: the choices, names, or the default."""
    entry = config.DECLARED.get(key)
    if entry is None:
        return []
    if entry.key in NAMES:
        known = _called(NAMES[entry.key], start.rpartition(",")[2])
        if typing.get_origin(entry.type) is not tuple:
            return known
        head = start[: len(start) - len(start.rpartition(",")[2])]
        given = head.strip("[").split(",")
        return [f"{head}{name}" for name in known if name not in given]
    kind = entry.type
    words = list(entry.choices) or (["true", "false"] if kind is bool else [config.as_text(entry.default)])
    optional = type(None) in typing.get_args(kind)
    return list(dict.fromkeys([*words, *(["null"] if optional else [])]))


def settings(start: str = "") -> list[str]:
    """Return KEY= for every key with this beginning; if there is only one, also its values."""
    key, equals, value = start.partition("=")
    if equals:
        return [f"{key}={word}" for word in values(key, value)]
    keys = [known for known in config.DECLARED if known.startswith(key)]
    offered = [f"{known}=" for known in keys]
    return offered if len(keys) != 1 else [*offered, *(f"{keys[0]}={word}" for word in values(keys[0]))]


def _called(source: Callable[..., list[str]], start: str) -> list[str]:
    return source(start) if source.__code__.co_argcount else source()


def completes(source: Callable[..., list[str]]) -> Callable[[str], list[str]]:
    """Return the function that Typer calls with the beginning of an argument."""

    def complete(incomplete: str) -> list[str]:
        return list(dict.fromkeys(word for word in _called(source, incomplete) if word.startswith(incomplete)))

    return complete


def of_setting(key: str) -> Callable[[str], list[str]]:
    """Return the completion function for an option that is a shortcut for a setting.

    If no values are known it offers nothing, and the shell offers files.
    """

    def complete(incomplete: str) -> list[str]:
        entry = config.DECLARED[key]
        if entry.key not in NAMES and not entry.choices:
            return []
        return list(dict.fromkeys(word for word in values(key, incomplete) if word.startswith(incomplete)))

    return complete


def words(incomplete: str) -> list[str]:
    """Complete an argument of `[KEY=VALUE]...`. bash splits it at '=' and ':', so the last word may be a piece."""
    if incomplete == ":":  # Typer needs offers with this beginning, bash without it
        return []
    place = int(os.environ.get("COMP_CWORD") or 0)
    line = os.environ.get("COMP_WORDS", "").split("\n")[: place + 1]
    option, whole = glue(line) if place else ("", incomplete)
    cut = len(whole) - len(incomplete)
    offered = values(OPTIONS[option], whole) if option in OPTIONS else settings(whole)
    return [word[cut:] for word in dict.fromkeys(offered) if word.startswith(whole)]


def glue(line: Iterable[str]) -> tuple[str, str]:
    """Return the option before the last argument, if any, and that argument with the pieces that bash cut off."""
    *before, whole = line
    while before and (whole[:1] in ("=", ":") or before[-1] in ("=", ":")):
        whole = before.pop() + whole
    option, equals, value = whole.partition("=")
    if option.startswith("--") and equals:
        return option, value
    return (before[-1] if before and before[-1].startswith("-") else ""), whole


OPTIONS = {
    "--model": "model.name",
    "-m": "model.name",
    "--teacher": "teacher.name",
    "--device": "run.device",
}
"""Options whose values contain ':'. bash passes their last piece like an argument of its own."""
