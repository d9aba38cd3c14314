"""Write a comparison as an HTML page without other files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from repan_cli.compare.groups import Comparison, Group
from repan_cli.compare.statistics import Spread
from repan_cli.compare.table import about, legend, notes, rows, titles
from repan_cli.compare.verdict import common_settings, numbered, sampling, verdict
from repan_cli.system.text import count, duration, percent

# ---------------------------------------------------------------------------------------------- the page


def render(comparison: Comparison, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """Return the comparison as one HTML file: table, curves, seeds, runs.

    `left_out` names the runs that are not included, each with the reason.
    """
    parts = [
        f"<h1>{escape(_heading(comparison))}</h1>",
        f"<p class=quiet>{escape(about(comparison))}</p>",
        f"<p class=verdict>{_whole_options(verdict(comparison))}</p>",
        *(f"<p class=note>{_whole_options(note)}</p>" for note in notes(comparison, left_out)),
        _section("Results", _table(titles(comparison), _numbered(comparison)), *_words(comparison)),
        *_common_section(comparison),
        *_curves_section(comparison),
        _section("Test top-1, a point a seed", _strip(comparison), "Bars: the mean."),
        _section("Runs", _table(RUN_TITLES, _run_rows(comparison))),
    ]
    return PAGE.format(title=escape(_tab(comparison)), style=STYLE, body="\n".join(parts))


def _heading(comparison: Comparison) -> str:
    return f"{count(len(comparison.groups), 'configuration')} compared"


def _tab(comparison: Comparison) -> str:
    """Return the title for a browser's tab, which distinguishes the page and does not repeat its heading."""
    names = sorted({result.dataset for group in comparison.groups for result in group.results})
    return f"repan on {', '.join(names)}"


def _section(title: str, *parts: str) -> str:
    body = "\n".join(part if part.startswith("<") else f"<p class=quiet>{escape(part)}</p>" for part in parts)
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _table(titles: Sequence[str], content: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(title)}" for title in titles)
    body = "\n".join(
        f"<tr><th scope=row>{_breakable(row[0])}" + "".join(f"<td>{escape(cell)}" for cell in row[1:])
        for row in content
    )
    return f"<div class=wide><table><thead><tr>{head}</thead>\n<tbody>{body}</tbody></table></div>"


def _breakable(text: str) -> str:
    """Escape a text, and allow line breaks after its slashes."""
    return escape(text).replace("/", "/<wbr>")


def _whole_options(text: str) -> str:
    """Escape a sentence, and keep the options in it on one line."""
    return re.sub(r"--[a-z][\w-]*(?: [\d,A-Z]+\b)?", r"<code>\g<0></code>", escape(text))


def _numbered(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the rows of the table with the numbers of their groups."""
    return [(f"{number}. {row[0]}", *row[1:]) for number, row in enumerate(rows(comparison), start=1)]


def _words(comparison: Comparison) -> Iterator[str]:
    """Yield explanations of the table's figures, and the precision of the test images."""
    yield legend(comparison)
    if (words := sampling(comparison)) is not None:
        yield words


def _common_section(comparison: Comparison) -> Iterator[str]:
    """List the settings that all runs share."""
    if shared := common_settings(comparison):
        entries = "".join(f"<li><code>{_breakable(f'{key}={value}')}</code>" for key, value in shared.items())
        words = "All other settings have their defaults."
        yield _section("In all runs", f"<ul class=shared>{entries}</ul>", words)


RUN_TITLES = ("run", "configuration", "seed", "test top-1", "last cycle", "val best", "epochs", "time")


def _run_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            str(result.path),
            str(number),
            str(result.seed),
            *(percent(value) for value in (result.test_top1, result.last_test_top1, result.val_top1)),
            str(result.epochs),
            duration(result.seconds),
        )
        for number, group in enumerate(comparison.groups, start=1)
        for result in group.results
    ]


def _key(comparison: Comparison) -> str:
    """Draw the legend, which maps each line and point to a group."""
    entries = (
        f'<li><svg width=30 height=12 aria-hidden=true><path d="M1 6H29" class="{_style(n)}"/></svg>'
        f"{escape(numbered(comparison, group))}{' (control)' if n == 0 and len(comparison.groups) > 1 else ''}"
        for n, group in enumerate(comparison.groups)
    )
    return f"<ul class=key>{''.join(entries)}</ul>"


COLORS = 6


def _style(number: int) -> str:
    """Return the style classes of a group's line.

    The control is dashed gray. Beyond six colors, lines are dotted.
    """
    if number == 0:
        return "line control"
    turn, color = divmod(number - 1, COLORS)
    return f"line c{color}" + " dotted" * (turn > 0)


# ---------------------------------------------------------------------------------------------- drawing

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 42
ROW = 48


class Scale(NamedTuple):
    """A scale that maps a range of values to a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        place = (value - self.low) / ((self.high - self.low) or 1)
        return round(self.start + place * (self.end - self.start), 1)

    def ticks(self, most: int = 8) -> list[float]:
        """Return at most this many round values within a range."""
        rough = (self.high - self.low) / most or 1
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10, 20) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Curve(NamedTuple):
    """Validation top-1 by epoch, counted over all phases: mean, minimum and maximum over seeds."""

    mean: list[float]
    low: list[float]
    high: list[float]


def curve(group: Group) -> Curve | None:
    """Return the curve over the epochs that all seeds have; None if nothing was held out."""
    courses = [[record["val_top1"] for record in result.records] for result in group.results]
    if not all(courses) or any(None in course for course in courses):
        return None
    columns = list(zip(*courses, strict=False))
    return Curve([sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns])


def cycle_starts(group: Group) -> dict[int, int]:
    """Return the number of epochs before each cycle of a group's runs."""
    cycles = [0, *(record["cycle"] for record in group.results[0].records)]
    return {cycle: done for done, (before, cycle) in enumerate(itertools.pairwise(cycles)) if cycle != before}


def _curves_section(comparison: Comparison) -> Iterator[str]:
    curves = [curve(group) for group in comparison.groups]
    if not any(curves):
        return
    words = "Mean over seeds, and from the lowest to the highest. Vertical lines: a cycle begins"
    restart = any(group.results[0].settings.get("cycle.restart") == "repan" for group in comparison.groups)
    words += ", with a restart except in runs without restarts." if restart else "."
    if cut := _cut(curves):
        words += f" Epochs below {cut:g} % are cut off."
    yield _section("Validation top-1 by epoch", _key(comparison), _chart(comparison, curves, cut), words)


def _cut(curves: Sequence[Curve | None]) -> float | None:
    """Choose the lower end of the axis so that the first epochs do not flatten the rest; None shows all of them."""
    values = sorted(value for found in curves if found for value in found.low)
    high = max(value for found in curves if found for value in found.high)
    lower = values[len(values) // 5]
    floor = math.floor(lower - 0.25 * (high - lower))
    return floor if floor > values[0] else None


def _chart(comparison: Comparison, curves: Sequence[Curve | None], cut: float | None) -> str:
    drawn = [found for found in curves if found]
    low = min(min(found.low) for found in drawn) if cut is None else cut
    high = max(max(found.high) for found in drawn)
    x = Scale(1, max(len(found.mean) for found in drawn), LEFT + 8, WIDTH - RIGHT)
    y = Scale(low, high + 0.03 * (high - low or 1), HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y), *_starts(comparison, x)]
    for band in (True, False):  # bands are drawn under all lines
        for number, found in enumerate(curves):
            if found:
                parts.append(_drawn(comparison.groups[number], found, x, y, number, band=band))
    clip = f"<clipPath id=plot><rect x={LEFT} y={TOP} width={WIDTH - LEFT} height={HEIGHT - TOP - BOTTOM} /></clipPath>"
    label = "Validation top-1 in percent by epoch, a line for each configuration"
    return _svg(HEIGHT, label, clip, *parts)


def _svg(height: float, label: str, *parts: str) -> str:
    return (
        f'<div class=wide><svg class=chart viewBox="0 0 {WIDTH} {height:g}" role=img aria-label="{escape(label)}">\n'
        + "\n".join(parts)
        + "</svg></div>"
    )


def _axes(x: Scale, y: Scale) -> Iterator[str]:
    for value in y.ticks():
        yield f'<path class=grid d="M{LEFT} {y(value)}H{WIDTH - RIGHT}"/>'
        yield f"<text class=tick x={LEFT - 8} y={y(value) + 4} text-anchor=end>{value:g}</text>"
    for value in x.ticks(12):
        if value == int(value):
            yield f"<text class=tick x={x(value)} y={y.start + 18} text-anchor=middle>{value:g}</text>"
    yield f"<text class=tick x={(x.start + x.end) / 2:g} y={y.start + 37} text-anchor=middle>epoch</text>"


def _starts(comparison: Comparison, x: Scale) -> Iterator[str]:
    """Draw a vertical line at the start of each cycle of any group."""
    starts: dict[int, set[int]] = {}
    for group in comparison.groups:
        for cycle, done in cycle_starts(group).items():
            starts.setdefault(done, set()).add(cycle)
    last = -math.inf
    for done, cycles in sorted(starts.items()):
        place = x(done + 0.5)
        yield f'<path class=start d="M{place} {TOP}V{HEIGHT - BOTTOM}"/>'
        if place - last > 55:
            last = place
            names = "/".join(map(str, sorted(cycles)))
            yield f"<text class=tick x={place} y={TOP - 8} text-anchor=middle>cycle {names}</text>"


def _drawn(group: Group, found: Curve, x: Scale, y: Scale, number: int, *, band: bool) -> str:
    def path(values: Sequence[float], order: int = 1) -> str:
        points = list(enumerate(values, start=1))[::order]
        return "L".join(f"{x(epoch)} {y(value)}" for epoch, value in points)

    style = _style(number).replace("line", "band" if band else "line")
    if band and len(group.seeds) == 1:
        return ""
    if len(found.mean) == 1 and not band:  # one point makes no line
        place = f"cx={x(1)} cy={y(found.mean[0])} r=4"
        return f'<circle class="{style.replace("line", "dot")}" {place}><title>{escape(group.label)}</title></circle>'
    shape = f"M{path(found.high)}L{path(found.low, -1)}Z" if band else f"M{path(found.mean)}"
    return f'<path clip-path="url(#plot)" class="{style}" d="{shape}"><title>{escape(group.label)}</title></path>'


def _strip(comparison: Comparison) -> str:
    """Draw a row per group: a point for each seed's test top-1, and a bar at their mean."""
    spreads = [Spread.of(list(group.by_seed("test_top1").values())) for group in comparison.groups]
    values = [value for spread in spreads for value in spread.values]
    margin = 0.08 * (max(values) - min(values)) or 0.5
    x = Scale(min(values) - margin, max(values) + margin, LEFT, WIDTH - RIGHT)
    bottom = ROW * len(spreads) + 8
    parts = []
    for value in x.ticks():
        parts.append(f'<path class=grid d="M{x(value)} 4V{bottom}"/>')
        parts.append(f"<text class=tick x={x(value)} y={bottom + 18} text-anchor=middle>{value:g}</text>")
    for number, (group, spread) in enumerate(zip(comparison.groups, spreads, strict=True)):
        middle = ROW * number + 34
        parts.append(f"<text class=name x={LEFT} y={middle - 15}>{escape(numbered(comparison, group))}</text>")
        if spread.sd is not None:
            parts.append(f'<path class="{_style(number)} mean" d="M{x(spread.mean)} {middle - 10}v20"/>')
        for seed, value in zip(group.seeds, spread.values, strict=True):
            text = escape(f"{group.label}, seed {seed}: {value:.2f}")
            dot = _style(number).replace("line", "dot")
            parts.append(f'<circle class="{dot}" cx={x(value)} cy={middle} r=5><title>{text}</title></circle>')
    return _svg(bottom + 26, "Test top-1 of each seed, a row for each configuration", *parts)


PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>{style}</style>
<main>
{body}
</main>
</html>
"""

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d7dce1; --note: #fff4d6;
  --c0: #0b62b5; --c1: #c2410c; --c2: #04785a; --c3: #a3195b; --c4: #6d3bd1; --c5: #856404; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e8eaed; --soft: #a5adb8; --rule: #353b44; --note: #3a3216;
    --c0: #6cb6ff; --c1: #ff9a5a; --c2: #4fd3a4; --c3: #ff8fc2; --c4: #bda2ff; --c5: #e6c84f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p { margin: .5rem 0; max-width: 50rem; }
.verdict { font-size: 1.1rem; font-weight: 500; margin: 1rem 0; }
.shared { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0;
  font-size: .85rem; }
.shared code { overflow-wrap: anywhere; }
.quiet { color: var(--soft); font-size: .9rem; }
.note { background: var(--note); padding: .4rem .75rem; border-left: 3px solid var(--c5); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; white-space: normal; min-width: 12rem; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0 0 .5rem; padding: 0;
  font-size: .9rem; }
.key svg { display: inline; margin-right: .5rem; vertical-align: middle; width: 30px; height: 12px; }
svg { display: block; width: 100%; height: auto; }
.chart { min-width: 40rem; }
.verdict code, .note code { font-size: .9em; white-space: nowrap; }
.line { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; }
.band { fill: currentColor; opacity: .2; }
.dot { fill: currentColor; fill-opacity: .6; stroke: currentColor; stroke-width: 1.5; }
.control { color: var(--soft); }
.line.control { stroke-dasharray: 7 4; }
.line.dotted { stroke-dasharray: 2 3; }
.line.mean { stroke-dasharray: none; stroke-width: 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.grid { stroke: var(--rule); stroke-width: 1; }
.start { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
.tick, .name { fill: var(--soft); font-size: 12.5px; }
.name { fill: var(--ink); }
"""
