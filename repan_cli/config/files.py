"""Read settings from YAML and from KEY=VALUE arguments, find presets, and write a configuration as YAML."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from repan_cli.config.conventions import ARM_FILE, BESIDE_CONFIG, CONFIG_FILE
from repan_cli.config.renamed import as_given, present, present_name
from repan_cli.config.settings import SCHEMA, Config, flatten
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import at_home, on_one_line

# ---------------------------------------------------------------------------------------------- reading


class _TextLoader(yaml.BaseLoader):
    """A YAML loader that keeps all scalars as text, refuses duplicate keys, and allows aliases only of single values.

    Aliases of lists of aliases of lists would let a file of a few lines fill the memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        alias = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        assert node is not None, "PyYAML raises where there is none"
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an alias can stand for one value only", problem_mark=alias)
        return node


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="expected 'key: value' lines", problem_mark=node.start_mark)
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' appears twice", problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_TextLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the flat layer of settings in a YAML text. `source` names it in errors."""
    return flatten_tree(parse_tree(text, source))


def parse_tree(text: str, source: str) -> dict[str, Any]:
    """Return the mapping of a YAML text, with all scalars as text. `source` names it in errors."""
    try:
        tree = yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two: "\\U00110000"
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(on_one_line(f"{source}{where}: {getattr(error, 'problem', None) or 'not YAML'}")) from None
    if tree is None or tree == "":
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected 'key: value' lines, found {type(tree).__name__}")
    return tree


def flatten_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested mappings by dotted key."""
    return dict(_flatten(tree, ""))


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def preset_folders() -> list[Path]:
    """Return the folders of presets: next to the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def named_files() -> list[tuple[str, Path]]:
    """Return the name and the path of each YAML file that ships with repan, such as recipes/cifar."""
    found: dict[str, Path] = {}
    for folder in preset_folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return list(found.items())


def presets() -> dict[str, Path]:
    """Return the shipped presets by name, such as recipes/cifar, without the grids of studies."""
    return {name: path for name, path in named_files() if not name.startswith("studies/")}


def about(preset: Path) -> str:
    """Return the text that a preset begins with: its comment up to the first empty line."""
    lines = (line.removeprefix("#").strip() for line in preset.read_text(encoding="utf-8").splitlines())
    return " ".join(itertools.takewhile(bool, lines))


def find_preset(name: str, *, near: Path | None = None) -> Path:
    """Return the file that `name` means: a path, a path relative to the file `near`, or a shipped preset."""
    name = at_home(name)
    for path in (Path(name), *([near.parent / name] if near else [])):
        with contextlib.suppress(OSError):  # the name is too long for a path
            if path.is_file():
                return path
    shipped = presets()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    inside = [known for known in shipped if name.removesuffix(".yaml").lower() in known.rpartition("/")[2].split("_")]
    meant = f"; did you mean {' or '.join(inside)}?" if inside else did_you_mean(name, shipped)
    hint = meant or "; 'repan list presets' shows those that ship with repan"
    raise InputError(f"no configuration file or preset '{name}'{hint}")


MOST_TEXT = 2**20
"""The largest number of characters in a preset; all existing settings need a hundredth of it."""


def read_file(path: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the layer of settings in a file, laid over that of its `base:` file, by the names that they have now."""
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base' leads back to itself")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_TEXT)
        if len(text) == MOST_TEXT:
            raise InputError(f"{path} is not a preset: {path.stat().st_size:,} bytes is too large for settings")
        layer = _by_present_names(parse_yaml(text, str(path)), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    base = layer.pop("base", None)
    if not base:
        return layer
    if not isinstance(base, str):
        raise InputError(f"{path}: base: expected the name of one file")
    try:
        found = find_preset(base, near=path)
    except InputError as error:
        raise InputError(on_one_line(f"{path}: base: {error}")) from None
    return {**read_file(found, seen=(*seen, path.resolve())), **layer}


def _by_present_names(layer: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the layer of a file by present names: users are told of old ones in theirs, not in those of runs."""
    return present(layer, where=str(path)) if _is_of_a_run(path) else as_given(layer, source=str(path))


def _is_of_a_run(path: Path) -> bool:
    """Return whether repan wrote a file of settings: that of a run, or that of a study's arm."""
    beside = path.name == CONFIG_FILE and any((path.parent / name).exists() for name in BESIDE_CONFIG)
    return beside or path.name == ARM_FILE


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Return the layer of `KEY=VALUE` arguments from the command line, by the present names of the settings."""
    layer: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            spaced = present_name(key) in SCHEMA or word.startswith("=")
            how = "without a space beside the '='" if spaced else "such as optim.lr=0.1"
            raise InputError(f"'{word}' is not KEY=VALUE, {how}")
        if key in layer:
            raise InputError(f"{key} is given twice on the command line")
        layer[key] = value
    return as_given(layer)


def dump(config: Config, *, cycles: bool = True) -> str:
    """Return the configuration as YAML, which `-c` reads back to the same values."""
    tree: dict[str, Any] = {}
    for key, value in flatten(config, cycles=cycles).items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = SCHEMA[key].shown(value) if key in SCHEMA else value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=False, allow_unicode=True)
