"""From a multi-branch network to a plain one, proven equal before anything is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repan_cli.blocks import rep_blocks, reparameterize
from repan_cli.errors import InputError, MergeError

TOLERANCE = 1e-10
"""Bound on the relative error in float64: a right merge is at 1e-15, a wrong one at 1e-2."""

PROOF_IMAGES = 16
"""Images that a merge is proven on."""


@dataclass(frozen=True)
class FuseReport:
    """How well the merged network agrees with the one it came from, and what it saves."""

    rel_error_fp64: float
    rel_error_fp32: float
    blocks: int
    params_before: int
    params_after: int
    seconds: float


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def fuse(model: nn.Module, images: Tensor) -> tuple[nn.Module, FuseReport]:
    """A merged float32 copy of a network on the CPU, in eval mode, and the proof that it is equal.

    The proof runs on a float64 copy whose merged kernels are not rounded: every block on the input it gets, and the
    logits, must agree to `TOLERANCE` relative. The float32 error is reported beside it.

    Args:
        model: a network with blocks; it is left as it is.
        images: a batch (N, C, H, W) to compare on, on the CPU.

    Raises MergeError when they disagree, InputError when there is nothing to merge.
    """
    began = time.perf_counter()
    model = copy.deepcopy(model).cpu().float().eval()
    blocks = dict(rep_blocks(model))
    if not blocks:
        raise InputError("the network has no re-parameterizable block: it is plain or already fused")
    error = _error_in_float64(model, images.double())
    merged = reparameterize(copy.deepcopy(model))
    single = relative_error(merged(images), model(images))
    counts = count_parameters(model), count_parameters(merged)
    return merged, FuseReport(error, single, len(blocks), *counts, time.perf_counter() - began)


def _error_in_float64(model: nn.Module, images: Tensor) -> float:
    exact = copy.deepcopy(model).double()
    merged = reparameterize(copy.deepcopy(exact))
    convs = dict(merged.named_modules())
    worst = 0.0
    with _recorded(exact) as calls:
        logits = exact(images)
    pairs = [(name, convs[name](x), y) for name, x, y in calls] + [("the logits", merged(images), logits)]
    for name, found, expected in pairs:
        error = relative_error(found, expected)
        if not error <= TOLERANCE:  # also catches nan
            raise MergeError(
                f"merging changed the function at {name}: relative error {error:.1e} in float64; nothing was written"
            )
        worst = max(worst, error)
    return worst


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Collect name, input and output of every block that is called meanwhile."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(
            lambda _, inputs, output, name=name: calls.append((name, inputs[0].clone(), output.clone()))
        )
        for name, block in rep_blocks(model)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
