"""Answer questions about a network: where its classifier is, which form it has, and which images it expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from repan_cli.blocks import rep_blocks
from repan_cli.checkpoint.card import MULTI_BRANCH, PLAIN


def classifier_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that compute the logits: those that the network names, else its last
    linear one.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    ask = getattr(model, "get_classifier", None)  # as timm's networks have
    found = ask() if callable(ask) else None
    if isinstance(found, nn.Module):
        inside = {id(module) for module in found.modules()}
        return [name for name in linear if id(model.get_submodule(name)) in inside]
    return [name for name in linear if isinstance(model.get_submodule(name), nn.Linear)][-1:]


def form_of(model: nn.Module) -> str:
    """Return the form of a network that was not fused: multi-branch, or plain if no block has a side branch."""
    return MULTI_BRANCH if any(len(block.branches) for _, block in rep_blocks(model)) else PLAIN


def wanted_images(model: nn.Module) -> dict[str, Any]:
    """Return how a timm network expects its images: `input_size`, `mean`, `std`, `crop_pct` and more."""
    resolved: Callable[[nn.Module], dict[str, Any]] = timm.data.resolve_model_data_config  # timm gives it no types
    return resolved(model)
