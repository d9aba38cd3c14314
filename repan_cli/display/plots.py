"""Draw plots: curves.png with accuracy, loss and rates over a run, and confusion.png. They need the `plot` extra."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repan_cli.system.packages import how_to_install
from repan_cli.system.text import shown

MOST_NAMES, FEW = 8, 20
BOXES = "Last Resort"
"""The font that has every letter, all of them as boxes."""

MOST_NAMED = 40
"""The largest number of classes whose names fit next to a picture."""


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def how_to_get() -> str:
    """Return the packages that drawing needs, and the command that installs them."""
    return f"it needs matplotlib, {how_to_install('matplotlib')}"


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Import matplotlib within the context without its remarks on its font cache and its folders."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def draw_curves(
    records: list[dict[str, Any]], target: Path, *, title: str, tests: Mapping[int, float] | None = None
) -> None:
    """Draw the records of a metrics.jsonl, at least one, into a PNG: panels for accuracy, loss, and rates that change.

    A star marks the best epoch, diamonds the test top-1 at the end of each cycle in `tests`, dotted lines where cycles
    begin.
    """
    with _without_remarks():
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
        from matplotlib.ticker import LogLocator

    epochs = range(1, len(records) + 1)
    changing = [key for key in RATES if _changes(records, key)]
    panels = 3 if changing else 2
    figure = Figure(figsize=(9, 7.5 if changing else 6), layout="constrained")
    accuracy, loss, *rates = figure.subplots(panels, 1, sharex=True, height_ratios=(3, 2, 1.3)[:panels])
    figure.suptitle(title, fontsize=11, parse_math=False)

    _line(accuracy, epochs, records, "train_top1", "training (augmented)", "tab:gray")
    _line(accuracy, epochs, records, "val_top1", "validation", "tab:blue")
    _mark_best(accuracy, records)
    _mark_tests(accuracy, records, tests or {})
    accuracy.set_ylabel("top-1, %")
    _line(loss, epochs, records, "loss", "training", "tab:gray")
    _line(loss, epochs, records, "val_loss", "validation", "tab:blue")
    loss.set(ylabel="loss", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    if changing:
        _draw_rates(rates[0], epochs, records, changing)
    drawn = [accuracy, loss, *rates]
    drawn[-1].set(xlabel="epoch")
    drawn[-1].xaxis.get_major_locator().set_params(integer=True)
    if len(records) == 1:
        drawn[-1].set(xlim=(0.5, 1.5), xticks=[1])
    for axes in drawn:
        axes.grid(alpha=0.25)
    _mark_cycles(records, drawn)
    accuracy.legend(loc="best", framealpha=0.85, edgecolor="none")
    figure.savefig(target, dpi=110)


RATES = {"lr": ("learning rate", "tab:red", "-"), "attach_rate": ("attach rate", "tab:blue", "--")}
"""Label, color and style of rates that may be constant over a whole run, and are then not drawn."""


def _changes(records: list[dict[str, Any]], key: str) -> bool:
    return len({record[key] for record in records}) > 1


def _draw_rates(axes: Any, epochs: Sequence[int], records: list[dict[str, Any]], changing: Sequence[str]) -> None:
    """Draw the rates that change; if there are two, each has its own axis."""
    for number, key in enumerate(changing):
        label, color, style = RATES[key]
        panel = axes if number == 0 else axes.twinx()
        _line(panel, epochs, records, key, label, color, linestyle=style)
        panel.set_ylabel(label + (" (dashed)" if style == "--" else ""), color=color)
        if key == "attach_rate":
            panel.set(ylim=(-0.08, 1.08))


def _mark_tests(axes: Any, records: list[dict[str, Any]], tests: Mapping[int, float]) -> None:
    """Mark test top-1 at the last epoch of each cycle that has it."""
    numbers = [record["cycle"] for record in records]
    ends = {cycle: len(numbers) - numbers[::-1].index(cycle) for cycle in tests if cycle in numbers}
    if ends:
        style = {"marker": "D", "markersize": 6, "color": "tab:orange", "linestyle": "none"}
        label = f"test, at the end of {'a phase' if len(set(numbers)) > 1 else 'the run'}"
        axes.plot([*ends.values()], [tests[cycle] for cycle in ends], label=label, **style)


def _mark_best(axes: Any, records: list[dict[str, Any]]) -> None:
    """Mark the epoch that validation chose."""
    scores = [-1.0 if record["val_top1"] is None else record["val_top1"] for record in records]
    best = max(scores)
    if best >= 0:
        epoch = scores.index(best) + 1
        axes.plot(epoch, best, marker="*", markersize=13, color="tab:blue", linestyle="none", label=f"best, {best:.2f}")


def _mark_cycles(records: list[dict[str, Any]], panels: list[Any]) -> None:
    """Draw dotted lines at the start of cycles, named above the first panel if there is room for names."""
    numbers = [record["cycle"] for record in records]
    cycles = list(dict.fromkeys(numbers))
    if len(cycles) == 1:
        return
    for cycle in cycles:
        first = numbers.index(cycle) + 0.5
        if first > 1:
            for axes in panels:
                axes.axvline(first, color="black", linestyle=":", linewidth=0.8)
        name = str(cycle) if len(cycles) > MOST_NAMES else f"cycle {cycle}" if cycle else "baseline"
        middle = first + numbers.count(cycle) / 2
        place = panels[0].get_xaxis_transform()
        panels[0].text(middle, 1.01, name, transform=place, ha="center", va="bottom", fontsize=8)


def _line(
    axes: Any,
    epochs: Sequence[int],
    records: list[dict[str, Any]],
    key: str,
    label: str,
    color: str,
    linestyle: str = "-",
) -> None:
    points = [(epoch, record[key]) for epoch, record in zip(epochs, records, strict=True) if record[key] is not None]
    if points:
        marker = "o" if len(points) < FEW else None  # one point makes no line
        axes.plot(
            *zip(*points, strict=True),
            label=label,
            color=color,
            linestyle=linestyle,
            linewidth=1.4,
            marker=marker,
            markersize=3,
        )


def draw_confusion(
    counts: Sequence[Sequence[int]], classes: Sequence[str], target: Path, *, title: str = ""
) -> list[str]:
    """Draw the confusion matrix, true classes (rows) by predicted classes (columns), in percent of each class, into a
    PNG.

    Returns the letters of the names that no available font has.
    """
    with _without_remarks():
        from matplotlib.figure import Figure

    classes = [shown(name, but="") for name in classes]
    fonts, lacking = _fonts_for("".join([*classes, title]))

    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    named = len(classes) <= MOST_NAMED
    side = min(5 + 0.25 * len(classes), 14) if named else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="taken for", ylabel="class")
    words: dict[str, Any] = {"parse_math": False, "fontfamily": fonts}  # a class may be called $x$
    figure.suptitle("\n".join(textwrap.wrap(shown(title, but=""), round(10 * side))), fontsize=11, **words)
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90, **words)
        axes.set_yticks(range(len(classes)), classes, **words)
    if len(classes) <= MOST_NAMED // 2:
        for row, values in enumerate(shares):
            for column, share in enumerate(values):
                if counts[row][column]:
                    color = "white" if share > 55 else "black"
                    axes.text(column, row, str(counts[row][column]), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, label="% of the class", shrink=0.8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # `lacking` reports this in words
        figure.savefig(target, dpi=110)
    return lacking


def _fonts_for(text: str) -> tuple[list[str], list[str]]:
    """Return the font families that cover all letters of a text, Matplotlib's own first, and the letters that
    none has.
    """
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = {letter for letter in text if not letter.isspace()}
    missing -= _letters(font_manager.findfont(families[0]), missing)
    for entry in font_manager.fontManager.ttflist if missing else ():
        if entry.name.startswith(BOXES):
            continue
        if found := _letters(entry.fname, missing):
            families.append(entry.name)
            missing -= found
        if not missing:
            break
    return families, sorted(missing)


def _letters(file: str, wanted: set[str]) -> set[str]:
    """Return the letters that a font has; none for a file that cannot be read."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(file)
        return {letter for letter in wanted if font.get_char_index(ord(letter))}
    except (OSError, RuntimeError):
        return set()
