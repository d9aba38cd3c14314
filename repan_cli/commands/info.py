"""`repan info`: what is in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from repan_cli import checkpoint, models
from repan_cli.blocks import rep_blocks
from repan_cli.checkpoint import Checkpoint
from repan_cli.config import SCHEMA
from repan_cli.console import by_reason, print_table
from repan_cli.models import user_file


def run(path: Path, *, model: str | None, as_json: bool) -> None:
    """Describe PATH: network, form, blocks, classes, where in its run it was saved, figures, settings, digest."""
    facts = describe(path, checkpoint.load(path), model)
    if as_json:
        print(json.dumps(facts))
        return
    layers, left, settings = facts.pop("layers"), facts.pop("left_alone"), facts.pop("config")
    changed = {key: value for key, value in settings.items() if _is_changed(key, value)}
    print_table(["", str(path)], [(name, _text(value)) for name, value in facts.items()])
    if layers:
        print_table(["block", "convolution"], layers.items())
    if left:
        print_table(["left alone", "why"], by_reason(left))
    print_table(["setting", "where it is not the default"], [(key, _text(value)) for key, value in changed.items()])


def _is_changed(key: str, value: Any) -> bool:
    default = SCHEMA[key].default if key in SCHEMA else None
    return key not in SCHEMA or value != (list(default) if isinstance(default, tuple) else default)


def describe(path: Path, saved: Checkpoint, network: str | None = None) -> dict[str, Any]:
    """The facts in plain types.

    `layers` maps the name of each block to its family and shape, `left_alone` that of each other convolution to the
    reason why it is no block.
    """
    hidden = network is None and user_file.names_a_file(saved.meta["model"])  # a person's own is not imported
    model = None if hidden else models.rebuild(saved, str(path), network)
    blocks = dict(rep_blocks(model)) if model else {}
    layers = {name: f"{block.family}, {_describe(block.trunk.conv)}" for name, block in blocks.items()}
    meta = {key: value for key, value in saved.meta.items() if key not in ("config", "structure")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved.weights.values())
    return {
        **meta,
        "parameters": sum(p.numel() for p in model.parameters()) if model else None,
        "bytes": size,
        "attach_rate": max((float(block.attach_rate) for block in blocks.values()), default=None),
        "digest": saved.digest(),
        "layers": layers,
        "left_alone": saved.meta["structure"]["left"],
        "config": saved.meta["config"],
    }


def _describe(conv: nn.Conv2d) -> str:
    size, stride = ("x".join(map(str, pair)) for pair in (conv.kernel_size, conv.stride))
    return f"{size}, {conv.in_channels} to {conv.out_channels} channels, stride {stride}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(_text(inner) for inner in value[:10])
        return f"{len(value)}: {shown}, ..." if len(value) > 10 else shown
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None or value == "" else str(value)
