"""Show a comparison of runs as a table with its notes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from repan_cli.compare import table
from repan_cli.compare.groups import Comparison
from repan_cli.display.console import tell
from repan_cli.display.tables import fits, print_table
from repan_cli.system.notices import warn


def show(comparison: Comparison, *, to_stderr: bool = False) -> None:
    """Print the table, and on stderr an explanation of its figures."""
    for warning in comparison.warnings:
        warn(warning)
    titles, rows = table.titles(comparison), table.rows(comparison)
    width = Console(stderr=to_stderr).width
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    figures = [(number, *row[1:]) for number, row in zip(numbers, rows, strict=True)]
    if _width([titles, *rows]) <= width or not fits(["", *titles[1:]], figures, width):
        print_table(titles, rows, to_stderr=to_stderr)
    else:  # names on their own lines
        names = ((number, row[0]) for number, row in zip(numbers, rows, strict=True))
        print_table(["", titles[0]], names, to_stderr=to_stderr)
        print_table(["", *titles[1:]], figures, to_stderr=to_stderr)
    tell(table.legend(comparison))


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Return the width of a table of these cells, with two spaces between columns."""
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True))
