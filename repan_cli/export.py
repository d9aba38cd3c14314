"""From a multi-branch network to a plain one, every BN folded, proven equal before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repan_cli.blocks import OWN, rep_blocks, reparameterize
from repan_cli.errors import InputError, MergeError
from repan_cli.models.expand import CEILING, EVERYTHING, NUDGE, Change, Expansion, apply, plan

TOLERANCE = 1e-10
"""Bound on the relative error in float64: a right merge is at 1e-15, a wrong one at 1e-2."""

PROOF_IMAGES = 16
"""Images that a merge is proven on."""


@dataclass(frozen=True)
class FuseReport:
    """How well the merged network agrees with the one it came from, and what it saves.

    `folded` counts the convolutions outside of blocks that took in the BN behind them.
    """

    rel_error_fp64: float
    rel_error_fp32: float
    blocks: int
    folded: int
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

    Every block becomes its convolution, and every convolution outside of blocks takes in the BN that reads it. The
    proof runs on float64 copies whose merged kernels are not rounded: every block on the input it gets, and the logits,
    must agree to `TOLERANCE` relative (logits of an ill-conditioned network to what `NUDGE` does). The float32 error is
    reported beside it.

    Args:
        model: a network with blocks, or with convolutions followed by a BN; it is left as it is.
        images: a batch (N, C, H, W) to compare on, on the CPU.

    Returns the network, whose `repan_report` says how it was made of a plain one, and the report.

    Raises MergeError when they disagree, InputError when there is nothing to merge.
    """
    began = time.perf_counter()
    model = copy.deepcopy(model).cpu().float().eval()
    blocks = sum(1 for _ in rep_blocks(model))
    folds = _foldable(model, images)
    if not blocks and not folds:
        raise InputError("there is nothing to merge: no block, and no BN behind a convolution")
    error = _error_in_float64(model, folds, images.double())
    merged = reparameterize(_folded(model, folds))
    single = relative_error(merged(images), model(images))
    before = getattr(model, "repan_report", Expansion(OWN, (), {}))
    merged.repan_report = dataclasses.replace(before, changes=(*before.changes, *folds))
    counts = count_parameters(model), count_parameters(merged)
    return merged, FuseReport(error, single, blocks, len(folds), *counts, time.perf_counter() - began)


def _foldable(model: nn.Module, images: Tensor) -> list[Change]:
    """The convolutions outside of blocks that a BN reads: as blocks without side branches they merge as all do."""
    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    if all(id(m) in inside for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        return []
    found = plan(model, images, family="plain", selection=EVERYTHING)
    return [change for change in found.changes if change.kind == "adapt" or change.norm]


def _folded(model: nn.Module, folds: list[Change]) -> nn.Module:
    model = copy.deepcopy(model)
    apply(model, folds)
    return model


def _error_in_float64(model: nn.Module, folds: list[Change], images: Tensor) -> float:
    exact = copy.deepcopy(model).double()
    expected = exact(images)
    sensitivity = relative_error(exact(images * (1 + NUDGE)), expected)
    exact = _folded(exact, folds)
    merged = reparameterize(copy.deepcopy(exact))
    convs = dict(merged.named_modules())
    worst = 0.0
    with _recorded(exact) as calls:
        exact(images)
    pairs = [(name, convs[name](x), y) for name, x, y in calls] + [("the logits", merged(images), expected)]
    for name, found, wanted in pairs:
        error = relative_error(found, wanted)
        bound = min(max(TOLERANCE, sensitivity), CEILING) if name == "the logits" else TOLERANCE
        if not error <= bound:  # also catches nan
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
