"""Pictures: curves.png, accuracy, loss and rates over a whole run, and confusion.png. They need the `plot` extra."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOW_TO_GET = "it needs matplotlib, pip install 'repan-cli[plot]'"
MOST_NAMED = 40
"""Classes that have room for their names beside a picture."""


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(records: list[dict[str, Any]], target: Path, *, title: str) -> None:
    """Draw the records of a metrics.jsonl, at least one, into a PNG: panels for accuracy, loss and both rates.

    Dotted lines mark where cycles begin.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    epochs = range(1, len(records) + 1)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    accuracy, loss, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.3))
    figure.suptitle(title, fontsize=11)

    _line(accuracy, epochs, records, "train_top1", "training (augmented)", "tab:gray")
    _line(accuracy, epochs, records, "val_top1", "validation", "tab:blue")
    accuracy.set_ylabel("top-1, %")
    _line(loss, epochs, records, "loss", "training", "tab:gray")
    _line(loss, epochs, records, "val_loss", "validation", "tab:blue")
    loss.set(ylabel="loss", yscale="log")
    _line(rates, epochs, records, "lr", "learning rate", "tab:orange")
    rates.set(xlabel="epoch")
    rates.set_ylabel("learning rate", color="tab:orange")
    attach = rates.twinx()
    _line(attach, epochs, records, "attach_rate", "attach rate", "tab:green")
    attach.set(ylim=(-0.05, 1.05))
    attach.set_ylabel("attach rate", color="tab:green")

    starts = [n for n, (a, b) in enumerate(itertools.pairwise(records), start=1) if a["cycle"] != b["cycle"]]
    for axes in (accuracy, loss, rates):
        axes.grid(alpha=0.25)
        for start in starts:
            axes.axvline(start + 0.5, color="black", linestyle=":", linewidth=0.8)
    accuracy.legend(loc="lower right", frameon=False)
    figure.savefig(target, dpi=110)


def _line(axes: Any, epochs: Sequence[int], records: list[dict[str, Any]], key: str, label: str, color: str) -> None:
    points = [(epoch, record[key]) for epoch, record in zip(epochs, records, strict=True) if record[key] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.4)


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
                    axes.text(column, row, counts[row][column], ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, label="% of the class", shrink=0.8)
    figure.savefig(target, dpi=110)
