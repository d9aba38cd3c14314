"""Write folders for the Hugging Face Hub that timm alone can open: weights, `config.json` and a model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from repan_cli import checkpoint, models
from repan_cli.blocks import NATIVE
from repan_cli.checkpoint.card import MULTI_BRANCH, PLAIN, ModelCard, Structure
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.conventions import CENTER, CROP_SHARE, INTERPOLATION, is_resized
from repan_cli.config.names import TIMM
from repan_cli.errors import InputError
from repan_cli.export.conv_bn import as_plain
from repan_cli.models.changes import changes_of
from repan_cli.system.files import to_json

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"

INSTEAD = "use --format safetensors, onnx or pt2"


def network_of_timm(fused: nn.Module, card: ModelCard, source: str) -> Checkpoint:
    """Return a merged network's weights in the places of the network that `timm.create_model` builds.

    A network with timm's own blocks keeps its branches, with all but one set to zero, because timm builds no merged
    network from a name. `timm.utils.reparameterize_model` merges it.

    Raises InputError, with the reason and another format, for a network that timm alone cannot build.
    """
    if not card.model.startswith(TIMM):
        whose = "of repan's own" if card.model in models.BUILTIN else "not one of timm's"
        raise InputError(f"{source} cannot be written as a timm folder: {card.model} is {whose}; {INSTEAD}")
    with torch.random.fork_rng(devices=[]):
        blank = models.create(card.model, num_classes=len(card.classes), in_chans=card.in_chans)
    try:
        if any(change.kind in ("adapt", "merge") for change in changes_of(fused)):
            models.load_foreign(blank, fused.state_dict(), source)
            network, form = blank, MULTI_BRANCH
        else:
            network, form = as_plain(fused, blank), PLAIN
    except InputError as error:
        why = str(error).removeprefix("--form conv-bn: ").partition(";")[0]
        raise InputError(f"{source} cannot be written as a timm folder: {why}; {INSTEAD}") from error
    block = NATIVE if form == MULTI_BRANCH else "plain"
    card = dataclasses.replace(card, block=block, structure=Structure(), form=form)
    return checkpoint.capture(network.eval(), card)


def files(saved: Checkpoint, readme: str) -> dict[str, bytes]:
    """Return the files of the folder, by name."""
    return {
        WEIGHTS: checkpoint.as_bytes(saved, ".safetensors"),
        CONFIG: (to_json(config_of(saved.card), indent=2) + "\n").encode(),
        README: readme.encode(),
    }


def config_of(card: ModelCard) -> dict[str, Any]:
    """Return the content of timm's `config.json`: the network, its classes, and the preprocessing of its images."""
    name, _, tag = card.model.removeprefix(TIMM).partition(".")
    known = timm.get_pretrained_cfg(name)
    layers = {key: getattr(known, key, None) for key in ("first_conv", "classifier")}
    content: dict[str, Any] = {
        "architecture": name,
        "num_classes": len(card.classes),
        "label_names": list(card.classes),
        "pretrained_cfg": {
            **({"tag": tag} if tag else {}),
            "custom_load": False,
            "input_size": [card.in_chans, card.image_size, card.image_size],
            "fixed_input_size": False,
            "interpolation": card.interpolation or INTERPOLATION,
            "crop_pct": crop_share(card),
            "crop_mode": card.crop_mode or CENTER,
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": len(card.classes),
            "pool_size": None,
            **{key: layer for key, layer in layers.items() if layer},
        },
    }
    return content if card.in_chans == 3 else {**content, "model_args": {"in_chans": card.in_chans}}


def crop_share(card: ModelCard) -> float:
    """Return the share of the resized picture's side that is kept: 1 if a square is resized as a whole."""
    if not is_resized(card.settings.get("data.crop", "auto"), card.image_size):
        return 1.0
    return CROP_SHARE if card.crop_share is None else card.crop_share


def open_by_timm(folder: Path) -> nn.Module:
    """Open a folder with timm alone."""
    network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return network.eval()
