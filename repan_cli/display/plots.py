"""Pictures: curves.png, accuracy, loss and rates over a whole run, and confusion.png. They need the `plot` extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOW_TO_GET = "it needs matplotlib, pip install 'repan-cli[plot]'"
MOST_NAMES, FEW = 8, 20
MOST_NAMED = 40
"""Classes that have room for their names beside a picture."""


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(records: list[dict[str, Any]], target: Path, *, title: str) -> None:
    """Draw the records of a metrics.jsonl, at least one, into a PNG: panels for accuracy, loss and both rates.

    A star marks the best epoch, dotted lines where cycles begin.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogLocator

    epochs = range(1, len(records) + 1)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    accuracy, loss, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.3))
    figure.suptitle(title, fontsize=11)

    _line(accuracy, epochs, records, "train_top1", "training (augmented)", "tab:gray")
    _line(accuracy, epochs, records, "val_top1", "validation", "tab:blue")
    _mark_best(accuracy, records)
    accuracy.set_ylabel("top-1, %")
    _line(loss, epochs, records, "loss", "training", "tab:gray")
    _line(loss, epochs, records, "val_loss", "validation", "tab:blue")
    loss.set(ylabel="loss", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("")
    _line(rates, epochs, records, "lr", "learning rate", "tab:red")
    rates.set(xlabel="epoch")
    rates.set_ylabel("learning rate", color="tab:red")
    rates.xaxis.get_major_locator().set_params(integer=True)
    if len({record["attach_rate"] for record in records}) > 1:
        _draw_attach_rate(rates.twinx(), epochs, records)

    for axes in (accuracy, loss, rates):
        axes.grid(alpha=0.25)
    _mark_cycles(records, [accuracy, loss, rates])
    accuracy.legend(loc="lower right", frameon=False)
    figure.savefig(target, dpi=110)


def _draw_attach_rate(axes: Any, epochs: Sequence[int], records: list[dict[str, Any]]) -> None:
    """The attach rate, where it changes."""
    _line(axes, epochs, records, "attach_rate", "attach rate", "tab:blue", linestyle="--")
    axes.set(ylim=(-0.08, 1.08))
    axes.set_ylabel("attach rate (dashed)", color="tab:blue")


def _mark_best(axes: Any, records: list[dict[str, Any]]) -> None:
    """The epoch that validation chose."""
    scores = [-1.0 if record["val_top1"] is None else record["val_top1"] for record in records]
    best = max(scores)
    if best >= 0:
        epoch = scores.index(best) + 1
        axes.plot(epoch, best, marker="*", markersize=13, color="tab:blue", linestyle="none", label=f"best, {best:.2f}")


def _mark_cycles(records: list[dict[str, Any]], panels: list[Any]) -> None:
    """Dotted lines where cycles begin, named above the first panel as long as there is room for names."""
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
        marker = "o" if len(points) < FEW else None  # a line through one point is none
        axes.plot(
            *zip(*points, strict=True),
            label=label,
            color=color,
            linestyle=linestyle,
            linewidth=1.4,
            marker=marker,
            markersize=3,
        )


def draw_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], target: Path) -> None:
    """Draw how often each class (rows) was taken for which (columns), in percent of its images, into a PNG."""
    from matplotlib.figure import Figure

    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    named = len(classes) <= MOST_NAMED
    side = min(5 + 0.25 * len(classes), 14) if named else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="taken for", ylabel="class")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= MOST_NAMED // 2:
        for row, values in enumerate(shares):
            for column, share in enumerate(values):
                if counts[row][column]:
                    color = "white" if share > 55 else "black"
                    axes.text(column, row, str(counts[row][column]), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, label="% of the class", shrink=0.8)
    figure.savefig(target, dpi=110)
