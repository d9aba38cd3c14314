"""Print tables whose figures and names stay whole: one that is too wide for the terminal becomes a list."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repan_cli.display.streams import Stderr
from repan_cli.system.text import shown

WIDE = 1000
"""The width of tables in files and pipes, where each row is one line."""

GAP = 2
"""Spaces between columns."""

LONG_WORD = 24
"""Longer words, such as paths, may be broken in a table."""

INDENT = "  "


def print_table(title: Sequence[str], rows: Iterable[Iterable[str]], *, to_stderr: bool = False) -> None:
    """Print a table, on stdout for commands whose result it is, else on stderr.

    Without a terminal, each row is one line.
    """
    cells = [[shown(cell) for cell in row] for row in rows]
    console = Console(file=cast("TextIO", Stderr()) if to_stderr else None, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    if not fits(title, cells, console.width):
        console.print(as_list(title, cells, console.width), soft_wrap=True)
        return
    table = _drawn(title, cells, console.width)
    if console.is_terminal or console.is_jupyter:
        console.print(table)
        return
    with console.capture() as drawn:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().removesuffix("\n").split("\n")))


def _drawn(title: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(title))
    for name, columns in zip(title, _widths(title, cells, width), strict=True):
        table.add_column(name, overflow="fold", width=columns)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _widths(title: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of columns: the widest give up what the terminal lacks. A short first column stays whole."""
    wanted = [max(map(len, column)) for column in zip(title, *cells, strict=True)]
    least = _least_widths(title, cells)
    if len(title) > 1 and wanted[0] <= width // 2 and wanted[0] + sum(least[1:]) + GAP * (len(title) - 1) <= width:
        least[0] = wanted[0]
    found = list(wanted)
    while sum(found) + GAP * (len(title) - 1) > width:
        spare = [number for number, least_width in enumerate(least) if found[number] > least_width]
        if not spare:
            break
        found[max(spare, key=lambda number: found[number])] -= 1
    return found


def fits(title: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> bool:
    """Return whether a table of this width breaks no word, and no name beside a text."""
    if len(title) == 2 and max((len(row[0]) for row in cells), default=0) > width // 2:
        return False
    return sum(_least_widths(title, cells)) + GAP * (len(title) - 1) <= width


def _least_widths(title: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of the longest word in each column."""
    return [
        min(max((len(word) for text in column for word in text.split()), default=0), LONG_WORD)
        for column in zip(title, *cells, strict=True)
    ]


def as_list(title: Sequence[str], cells: Iterable[Sequence[str]], width: int) -> Text:
    """Return the rows of a table below each other, each with its first cell as a heading."""
    titles = [" ".join(name.split()) for name in title]
    margin = max(map(len, titles[1:]), default=0) + GAP
    heads = [", ".join(filter(None, titles))] if len(titles) == 2 else []
    text = Text("\n".join(heads), style="bold")
    for row in cells:
        text.append("\n" if text else "").append(f"{'' if heads else titles[0]} {row[0]}".strip(), style="bold")
        for name, cell in zip(titles[1:], row[1:], strict=True):
            begin = INDENT if heads else f"{INDENT}{name.ljust(margin)}"
            inside = textwrap.wrap(
                cell,
                max(width, 2 * len(begin)),
                initial_indent=begin,
                subsequent_indent=" " * len(begin),
                break_long_words=False,
                break_on_hyphens=False,
            )
            text.append("".join(f"\n{line}" for line in inside), style="not bold")
    return text
