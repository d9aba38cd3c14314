"""Write the model card of a folder for the Hub: README.md, with measured figures and the commands that made the
network.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import repan_cli
from repan_cli import config
from repan_cli.checkpoint.card import MULTI_BRANCH, ModelCard
from repan_cli.checkpoint.preprocessing import SQUARE, preprocessing
from repan_cli.config.conventions import SAME_RESULT
from repan_cli.errors import InputError
from repan_cli.system.text import short

MEASURED = {
    "test_top1": "top-1 accuracy on the test part, %",
    "test_top5": "top-5 accuracy on the test part, %",
    "val_top1": "top-1 accuracy on the validation part, %",
    "val_top5": "top-5 accuracy on the validation part, %",
    "val_loss": "loss on the validation part",
    "params_before": "parameters in training",
    "params_after": "parameters, merged",
    "gmacs_before": "MACs of an image in training",
    "gmacs_after": "MACs of an image, merged",
    "rel_error_fp64": "relative error of the merging, float64",
    "rel_error_fp32": "relative error of the merging, float32",
}
"""Figures that a card shows, in this order, and their labels."""

MACS = ("gmacs_before", "gmacs_after")
"""Figures in units of 1e9 that are shown as counts."""

PLACES = SAME_RESULT | {"run.out", "model.init", "teacher.name"}
"""Settings that are left out of the command, because they name places on one machine or change nothing."""

TEMPLATE = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- repan
---
# {title}

`{architecture}` for {classes} classes, {images}.
It was {how} by [repan](https://pypi.org/project/repan-cli/) {version}, and proven to compute what the trained network
does.

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:ORG/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(Image.open("photo.jpg").convert("{mode}")).unsqueeze(0))
```
{merge}
## Figures

| figure | value |
| --- | --- |
{figures}

## Images

{preparation}

## Made by

```bash
{commands}
```
"""

SQUARES = """
timm's transform does the same with pictures of this size; others it resizes by one filter, which gives other logits."""

MERGE = """
timm builds this network with its branches, of which all but one are silent; `timm.utils.reparameterize_model(model)`
gives the merged one.
"""


def readme(card: ModelCard, source: str, *, proof: Mapping[str, Any]) -> str:
    """Return the text of a card.

    Args:
        card: the description of the network as it is saved.
        source: the file that it was merged from, as the user typed it.
        proof: the figures of the merge, a `FuseReport` as a dictionary, or nothing.
    """
    name, _, _ = card.model.rpartition(":")[2].partition(".")
    found = {**card.metrics, **_test_figures(Path(source)), **proof}
    found |= {key: 1e9 * found[key] for key in MACS if _is_number(found.get(key))}
    shown = {key: (short if key in MACS else _number)(found[key]) for key in MEASURED if _is_number(found.get(key))}
    rows = [f"| {MEASURED[key]} | {text} |" for key, text in shown.items()]
    side, classes = card.image_size, len(card.classes)
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (card.mean, card.std))
    color = "RGB" if card.in_chans == 3 else "gray"
    steps = preprocessing(card)
    note = SQUARES if steps["crop_mode"] == SQUARE else ""
    typed = Path(source).name if Path(source).is_absolute() else source  # a card names no folder of its author
    return TEMPLATE.format(
        title=Path(source).stem.rpartition(":")[2] or name,
        architecture=name,
        classes=classes,
        images=f"{color} images of {side} x {side} pixels",
        how="merged" if proof else "written",
        version=repan_cli.__version__,
        mode="RGB" if card.in_chans == 3 else "L",
        merge=MERGE if card.form == MULTI_BRANCH else "",
        figures="\n".join(rows) or "| none was measured | |",
        preparation=f"{_sentence(steps['preprocessing'])} (mean {mean}, std {std}).{note}",
        commands="\n".join([*_training(card), f"repan fuse {shlex.quote(typed)} --format timm"]),
    )


def _training(card: ModelCard) -> list[str]:
    """Return the command that trained a network, with the settings that are not defaults; empty if it is not known."""
    stored = card.settings
    if card.command not in ("train", "distill", "cycle") or not isinstance(stored.get("data.name"), str):
        return []
    first = {key: config.as_text(stored[key]) for key in ("model.name", "data.name") if stored.get(key) is not None}
    more = {"teacher.name": "FILE"} if card.command == "distill" else {}
    init = {"model.init": "FILE"} if stored.get("model.init") else {}
    try:
        usual = config.flatten(config.resolve(card.command, None, {**first, **more, **init}).config)
    except InputError:
        return []
    differing = {
        key: config.as_text(value)
        for key, value in stored.items()
        if key in usual and key not in PLACES and _plain(usual[key]) != _plain(value)
    }
    words = [f"{key}={value}" for key, value in {**first, **more, **init, **differing}.items()]
    return [shlex.join(["repan", card.command, *words])]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _test_figures(source: Path) -> dict[str, Any]:
    """Return the figures on the test part that a run noted next to its file."""
    folder = source if source.is_dir() else source.parent
    if not source.is_dir() and source.name not in ("best.pt", "fused.pt"):
        return {}
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["test"]
        return {f"test_{key}": value for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
