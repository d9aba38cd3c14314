"""Read settings by their old names: users may write them for one more version, and files that repan wrote keep them.

`RENAMED` is the only table. `as_given` reads what a user typed or wrote, and reports the new name. `present` reads run
directories, checkpoints and records of older versions, without a notice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import repan_cli
from repan_cli.config.schema import as_text
from repan_cli.config.settings import DECLARED
from repan_cli.errors import InputError
from repan_cli.system.notices import warn_once
from repan_cli.system.text import on_one_line


class Renamed(NamedTuple):
    """The present name of a setting, and the version from which the user's old name is refused."""

    key: str
    refused_from: str


RENAMED = {"cycle.lr": Renamed("cycle.schedule", "0.3")}
"""The renamed settings by their old names. An entry stays, because runs of older versions are read by it."""

BASELINE = "baseline."


def present_name(key: str) -> str:
    """Return the present name of a setting, also below `baseline`; an unknown key is returned unchanged."""
    start = BASELINE if key.startswith(BASELINE) else ""
    entry = RENAMED.get(key.removeprefix(start))
    name = f"{start}{entry.key}" if entry else key
    return name if name in DECLARED else key


def present(values: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Return values by the present names of their settings, in the same order.

    Raises InputError, beginning with `where`, for a setting that has two values, one under each name.
    """
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in values.items():
        name = present_name(key)
        if name in found and not _same(name, found[name], value):
            both = f"{names[name]}={as_text(found[name])} and {key}={as_text(value)}"
            raise InputError(on_one_line(f"{_head(where)}{both} are the same setting: give {name} alone"))
        found.setdefault(name, value)
        names.setdefault(name, key)
    return found


def as_given(values: Mapping[str, Any], *, source: str = "", where: str | None = None) -> dict[str, Any]:
    """Return what a user gave by the present names of the settings, with a notice for each old name.

    Args:
        values: values by dotted key.
        source: the file that holds them, which notices name; empty for the command line.
        where: the place in it, which errors name; by default the file.

    Raises InputError for a setting with two values, and for an old name that is no longer read.
    """
    found = present(values, where=source if where is None else where)
    for key in values:
        if (name := present_name(key)) != key:
            until = RENAMED[key.removeprefix(BASELINE)].refused_from
            if key == "cycle.lr" and _is_number(values[key]):
                given = f"{key}={as_text(values[key])}"
                head = _head(source if where is None else where)
                raise InputError(on_one_line(f"{head}{given} is no schedule: for a learning rate give --lr (optim.lr)"))
            if _version(repan_cli.__version__) >= _version(until):
                raise InputError(on_one_line(f"{_head(source if where is None else where)}{key} is now {name}"))
            warn_once(on_one_line(f"{_head(source)}{key} is now {name}; the old name will be removed in {until}"))
    return found


def _head(where: str) -> str:
    return f"{where}: " if where else ""


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(as_text(value)))
    except ValueError:
        return False


def _same(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of a setting, typed or as text, mean the same."""
    entry = DECLARED[name]
    try:
        return bool(entry.parse(as_text(one)) == entry.parse(as_text(other)))
    except ValueError:
        return bool(one == other)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))
