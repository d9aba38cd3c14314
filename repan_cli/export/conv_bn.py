"""Write the form `conv-bn`: merged weights in the places of the plain network, with an identity BN after each
convolution.

The file then loads strictly into the network as its authors build it: `timm.create_model(...).load_state_dict(...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import timm.utils
import torch
from torch import Tensor, nn

from repan_cli.blocks import rep_blocks
from repan_cli.blocks.branches import ConvBN
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.checkpoint.card import Change
from repan_cli.errors import InputError
from repan_cli.models.changes import report_of

Places = Mapping[str, tuple[str, str | None]]
"""For each merged convolution by name, the convolution and the BN of the plain network that take its weights."""


@torch.no_grad()
def as_plain(fused: nn.Module, plain: nn.Module) -> nn.Module:
    """Load the weights of a network merged from an expansion of `plain` into `plain`, in place, and return it.

    A BN after a merged convolution becomes the identity plus the merged bias: mean 0, variance 1, gamma sqrt(1 + eps).
    If the plain network has multi-branch blocks of timm's own, timm merges them first.

    Args:
        fused: a merged network, whose `repan_report` says how it was made.
        plain: the network as its authors build it, or one built of blocks without side branches.

    Raises InputError if the plain network has no place for a merged bias.
    """
    report = report_of(fused)
    changes = report.changes if report else ()
    if any(change.kind in ("adapt", "merge") for change in changes):
        plain = timm.utils.reparameterize_model(plain)
    plain.eval()
    places = _places(changes, plain)
    state, own = _state_of(fused), _state_of(plain)
    for merged, (conv, norm) in places.items():
        weight, bias = state.pop(f"{merged}.weight"), state.pop(f"{merged}.bias")
        state[f"{conv}.weight"] = weight
        if f"{conv}.bias" in own:
            state[f"{conv}.bias"], bias = bias, torch.zeros_like(bias)
        if norm is not None:
            state |= _identity(cast("BatchNorm", plain.get_submodule(norm)), norm, bias)
        elif bias.any():
            raise InputError(
                f"--form conv-bn: {conv} of the plain network has no BN and no bias to take the merged bias"
            )
    state |= {f"{name}.attach_rate": block.attach_rate for name, block in rep_blocks(plain)}
    if differing := sorted(state.keys() ^ own.keys()):
        raise _no_place(differing[0])
    plain.load_state_dict(state, strict=False)  # without second names of the same tensors
    return plain


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network, each under the first of its names."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in model.state_dict().items() if name in names}


def _no_place(name: str) -> InputError:
    return InputError(
        f"--form conv-bn: the plain network has different layers at {name} (it keeps its branches, or timm merges it "
        "in its own way); use --form conv"
    )


def _places(changes: tuple[Change, ...], plain: nn.Module) -> Places:
    """Find the places of the fused network's convolutions in the plain one; those not listed keep their names."""
    names = {name for name, _ in plain.named_modules()}
    expanded = {change.name: (change.name, change.norm) for change in changes if change.kind == "expand"}
    blocks = {name: _place_in_block(name, block.trunk) for name, block in rep_blocks(plain)}
    if missing := [name for place in expanded.values() for name in place if name is not None and name not in names]:
        raise _no_place(missing[0])
    return {**expanded, **blocks}


def _place_in_block(name: str, trunk: ConvBN) -> tuple[str, str | None]:
    return f"{name}.trunk.conv", f"{name}.trunk.norm" if trunk.has_norm else None


def _identity(norm: BatchNorm, name: str, bias: Tensor) -> dict[str, Tensor]:
    """Return the state of a BN that adds `bias` and does nothing else. Its counter says that it is not fresh."""
    if norm.weight is None or norm.bias is None:
        raise InputError(f"--form conv-bn: {name} of the plain network has no affine parameters to take the bias")
    ones = torch.ones_like(bias)
    state = {"running_mean": torch.zeros_like(bias), "running_var": ones, "bias": bias}
    state["weight"] = (ones.double() * (1 + norm.eps) ** 0.5).to(bias.dtype)
    if (counter := getattr(norm, "num_batches_tracked", None)) is not None:  # a frozen BN has none
        state["num_batches_tracked"] = torch.ones_like(counter)
    return {f"{name}.{key}": value for key, value in state.items()}
