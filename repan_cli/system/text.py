"""Format numbers, durations and names for people."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def on_one_line(text: str) -> str:
    """Shorten text from a file, and escape line ends and characters that a terminal does not show."""
    if len(text) > 400:
        text = f"{text[:300]} ... {text[-90:]}"
    return shown(text, but="")


def shown(text: str, *, but: str = "\n") -> str:
    """Escape control and invisible characters, since names in files may hold escape sequences.

    `but` holds exceptions.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in but else repr(sign)[1:-1] for sign in text)


def first_line(error: BaseException) -> str:
    """Return the first meaningful line of an error, or its type, without the pages that may follow."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


SPARKLINE_WIDTH = 60
NAMES_SHOWN = 6

SPARKS = "▁▂▃▄▅▆▇█"


LOCAL = "local-dir:"
"""The prefixes by which timm distinguishes a folder from a name."""


def at_home(path: str) -> str:
    """Return a path with a leading '~' replaced by the home folder, because shells do not expand it in --out=~/x.

    timm's `local-dir:` in front of a folder is removed.
    """
    path = path.removeprefix(LOCAL)
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # there is no such user
        return path


def from_home(path: str) -> str:
    """Return a path with the home folder replaced by '~', which `at_home` undoes."""
    try:
        home = str(Path.home())
    except RuntimeError:  # there is none
        return path
    inside = path.startswith(home.rstrip("/") + "/") and home != "/"
    return "~" + path[len(home.rstrip("/")) :] if inside else path


def last_part(value: Any) -> Any:
    """Return the last part of an absolute path, and any other value unchanged."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def quoted(path: object) -> str:
    """Return a path or a word quoted for a shell, for commands that are printed to be copied."""
    return shlex.quote(str(path))


COMMAND = re.compile(r"\b(repan|torchrun|pip|python3?) [-a-z]")


def wrapped(text: str, width: int, *, before: int = 0) -> str:
    """Wrap a sentence between words for a terminal. A sentence with a command stays whole, so that it can be copied.

    Args:
        text: lines of text.
        width: the columns of the terminal.
        before: the columns that are already used on the first line.
    """
    if COMMAND.search(text) or not text.strip():
        return text
    wrapper = textwrap.TextWrapper(
        max(width, 20), initial_indent=" " * before, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join("\n".join(wrapper.wrap(line)) for line in text.split("\n"))[before:]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def loss_text(value: float) -> str:
    """Return a loss in at most seven characters: 0.693, 1087, 1.1e+07."""
    if not abs(value) < 1e7:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 epoch, 2 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(number: float | None) -> str:
    """Show a large count in three digits: 64.8 k, 2.7 M."""
    if number is None:
        return "-"
    rounded = float(f"{number:.3g}")
    power = min(int(math.log10(max(rounded, 1))) // 3, 3)
    return f"{rounded / 1000**power:.3g} {' kMG'[power]}".strip()


def file_size(count_of_bytes: int) -> str:
    """Return the size of a file: 8.4 KiB, 2.41 MiB."""
    if count_of_bytes < 2**20 / 10:
        return f"{count_of_bytes / 2**10:.1f} KiB"
    return f"{count_of_bytes / 2**20:.2f} MiB"


def duration(seconds: float) -> str:
    """Return seconds as people say them: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def sparkline(values: Iterable[float | None]) -> str:
    """Return a row of bars between the lowest and the highest value; with many values, each bar is the mean of some."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    if len(known) > SPARKLINE_WIDTH:
        cuts = [round(place * len(known) / SPARKLINE_WIDTH) for place in range(SPARKLINE_WIDTH + 1)]
        known = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, span = min(known), (max(known) - min(known)) or 1
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in known)


def some(names: list[str]) -> str:
    """Return the first of many names, and their number."""
    return ", ".join(names[:NAMES_SHOWN]) + (f", ... ({len(names)})" if len(names) > NAMES_SHOWN else "")


def by_reason(left: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a row for each reason: some of the names that it applies to, and the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    return [(some(found), reason) for reason, found in names.items()]
