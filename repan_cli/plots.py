"""curves.png: accuracy, loss, learning rate and attach rate over a whole run. Needs matplotlib, the `plot` extra."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
