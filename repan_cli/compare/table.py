"""Write a comparison as a table: titles, rows, and notes that explain its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repan_cli import __version__
from repan_cli.compare.groups import Comparison, Group
from repan_cli.compare.statistics import CONFIDENCE, Difference, Spread
from repan_cli.runs.directory import now
from repan_cli.runs.felt import HEADS, covered
from repan_cli.system.text import count, duration, percent, short

RESTART_LOSS = "restart loss"
"""The title of the column with the training loss after a restart; see `Comparison.felt`."""

METHODS = {"paired": "paired by seed", "welch": "by Welch's t-test, as the seeds differ"}


def titles(comparison: Comparison) -> tuple[str, ...]:
    """Return the titles of the columns of `rows`."""
    several = comparison.control_count > 1
    over = [f"over {control.label}" for control in comparison.controls] if several else ["over the control"]
    figures = ("test top-1", "last cycle", "val best", *over, *_if_felt(comparison, RESTART_LOSS))
    return ("runs", "seeds", *figures, "epochs", "images", "time")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a row per group, under `titles`; epochs, images and time are those of one run."""
    return [_row(comparison, group) for group in comparison.groups]


def _row(comparison: Comparison, group: Group) -> tuple[str, ...]:
    cost = group.cost()
    return (
        group.label,
        str(len(group.seeds)),
        *(_spread(group.spread(figure)) for figure in ("test_top1", "last_test_top1", "val_top1")),
        *(_over(comparison, group, over) for over in comparison.controls),
        *_if_felt(comparison, _felt(comparison.felt(group))),
        f"{cost.epochs:g}",
        short(cost.images),
        duration(3600 * cost.hours),
    )


def _over(comparison: Comparison, group: Group, control: Group) -> str:
    """Show the difference of a group from a control; a single group is no control."""
    if group is not control:
        return _gain(comparison.gain(group, over=control))
    return "control" if len(comparison.groups) > 1 else "-"


def _spread(spread: Spread | None) -> str:
    if spread is None or spread.sd is None:
        return percent(spread.mean if spread else None)
    return f"{spread.mean:.2f} ± {spread.sd:.2f}"


def _if_felt(comparison: Comparison, cell: str) -> tuple[str, ...]:
    """Return a cell of the column that exists only in comparisons of a restart with its control."""
    return (cell,) if any(comparison.felt(group) for group in comparison.groups) else ()


def _felt(ratios: Mapping[int, float]) -> str:
    """Show the smallest and the largest ratio of the restarts."""
    ends = [f"{of(ratios.values()):.2f}" for of in (min, max)] if ratios else ["-"]
    return " to ".join(dict.fromkeys(ends))


def _gain(gain: Difference | None) -> str:
    if gain is None:
        return "-"
    interval = "" if gain.low is None else f" [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"{gain.mean:+.2f}{interval}"


def legend(comparison: Comparison) -> str:
    """Explain the figures of the table in a sentence or two."""
    spread = [group for group in comparison.groups if len(group.seeds) > 1]
    words = "top-1 in percent, of the network that validation chose and of the end of the last cycle"
    if spread:
        words += "; mean ± standard deviation over seeds"
    if len(spread) < len(comparison.groups):
        words += "; one seed gives no spread and no interval"
    gains = [comparison.gain(group, over=over) for group in comparison.groups for over in comparison.controls]
    methods = {gain.method for gain in gains if gain and gain.method and not gain.constant}
    if methods:
        how = " or ".join(METHODS[method] for method in sorted(methods))
        words += f"; in brackets the {CONFIDENCE:.0%} confidence interval, {how}"
    if any(gain and gain.constant for gain in gains):
        words += "; a difference that is the same with every seed has no interval"
    if _if_felt(comparison, RESTART_LOSS):
        words += (
            f"; {RESTART_LOSS}: training loss of the {_felt_steps(comparison)} steps after a restart, divided by a "
            "control's over the same steps; of several restarts the smallest and the largest"
        )
    return f"{words}."


def _felt_steps(comparison: Comparison) -> str:
    """Return the number of steps over which the losses after restarts were averaged."""
    courses = [
        [record for record in result.records if record["cycle"] == cycle]
        for group in comparison.groups
        for cycle in comparison.felt(group)
        for result in group.results
    ]
    return covered(courses, HEADS[-1])


def markdown(comparison: Comparison, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """Return the table, with the devices of its runs and an explanation of its figures."""
    devices = [", ".join(group.devices()) or "-" for group in comparison.groups]
    body = [(*row, device) for row, device in zip(rows(comparison), devices, strict=True)]
    head = (*titles(comparison), "device")
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    lines_below = [f"- {note}\n" for note in notes(comparison, left_out)]
    text = f"{table}\n\n{about(comparison)}: {legend(comparison)}\n"
    return f"{text}\n{''.join(lines_below)}" if lines_below else text


def notes(comparison: Comparison, left_out: Sequence[tuple[str, str]]) -> list[str]:
    return [*comparison.warnings, *(f"left out: {path}: {why}" for path, why in left_out)]


def about(comparison: Comparison) -> str:
    results = [result for group in comparison.groups for result in group.results]
    names = sorted({result.dataset + f" ({result.classes} classes)" * bool(result.classes) for result in results})
    return f"{count(len(results), 'run')} on {', '.join(names)}. repan {__version__}, {now()}"
