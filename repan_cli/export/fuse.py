"""From a multi-branch network to a plain one, every BN folded, proven equal before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repan_cli.blocks import NATIVE, rep_blocks, reparameterize
from repan_cli.blocks.kernel import BatchNorm, running_stats
from repan_cli.checkpoint.card import Change
from repan_cli.errors import InputError, MergeError
from repan_cli.models.changes import EVERYTHING, Expansion, apply, report_of, set_report
from repan_cli.models.expand import plan
from repan_cli.models.probe import CEILING, NUDGE, copied
from repan_cli.models.rebuild import load
from repan_cli.system.images import ImagesLike, first_batch

TOLERANCE = 1e-10
"""Bound on the relative error in float64: a right merge is at 1e-15, a wrong one at 1e-2."""

PROOF_IMAGES = 8
"""Images of a kind (random, real) that a merge is proven on; in float64, which takes longer, `EXACT_IMAGES` of all."""

EXACT_IMAGES = 2


@dataclass(frozen=True)
class FuseReport:
    """The agreement of the merged network with the one it came from, and what it saves.

    `folded` counts the convolutions outside of blocks that took in the BN behind them. `gmacs` are the billions of
    multiplications that convolutions and matrix products make of one image.
    """

    rel_error_fp64: float
    rel_error_fp32: float
    blocks: int
    folded: int
    params_before: int
    params_after: int
    gmacs_before: float
    gmacs_after: float
    seconds: float


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image (1, C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton where that is installed

    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@torch.no_grad()
def fuse(model: nn.Module | str | Path, images: ImagesLike) -> tuple[nn.Module, FuseReport]:
    """A merged float32 copy of a network on the CPU, in eval mode, and the proof that it is equal.

    Every block becomes its convolution, and every convolution outside of blocks takes in the BN that reads it. The
    proof runs on float64 copies whose merged kernels are not rounded: every block on the input it gets, and the logits,
    must agree to `TOLERANCE` relative (logits of an ill-conditioned network to what `NUDGE` does). The float32 error is
    reported beside it.

    Args:
        model: a network with blocks, or with convolutions followed by a BN, which is left as it is; or what `load`
            takes, a file or the folder of a run.
        images: images (N, C, H, W) to compare on, a batch of a loader, or the loader, whose first batch is taken.

    Returns the network, whose `repan_report` says how it was made of a plain one, and the report.

    Raises MergeError when they disagree, InputError when there is nothing to merge or a weight is not finite.
    """
    began = time.perf_counter()
    if not isinstance(model, nn.Module):
        model = load(model)
    images = first_batch(images).detach().cpu().float()
    check_finite(model)
    exact = copied(model).cpu().float().double().eval()
    blocks = [name for name, _ in rep_blocks(exact)]
    merged = reparameterize(copy.deepcopy(exact))
    folds = [change for change in _foldable(merged, images) if change.name not in blocks]
    if not blocks and not folds:
        raise InputError("there is nothing to merge: no block, and no BN behind a convolution")
    apply(merged, folds)
    reparameterize(merged)
    own = [change for change in folds if change.kind == "adapt"]
    blocked = copy.deepcopy(exact)
    apply(blocked, own)  # so that every block can be watched
    blocks = [name for name, _ in rep_blocks(blocked)]
    error = _error_in_float64(exact, blocked, merged, _few(images).double())
    merged, model = merged.float(), exact.float()
    single = relative_error(merged(images), model(images))
    before = report_of(model) or Expansion(NATIVE, (), {})
    set_report(merged, dataclasses.replace(before, changes=(*before.changes, *folds)))
    return merged, FuseReport(
        rel_error_fp64=error,
        rel_error_fp32=single,
        blocks=len(blocks),
        folded=len(folds) - len(own),
        params_before=count_parameters(model),
        params_after=count_parameters(merged),
        gmacs_before=count_macs(model, images[:1]) / 1e9,
        gmacs_after=count_macs(merged, images[:1]) / 1e9,
        seconds=time.perf_counter() - began,
    )


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming the first weight or statistic that is not finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(
                f"'{name}' holds values that are not finite: the network has diverged; take an earlier checkpoint"
            )


def untrained_norms(model: nn.Module) -> list[str]:
    """Return the BN, by name, that have never seen a batch: their statistics are those they were made with."""
    norms = [(name, norm) for name, norm in model.named_modules() if isinstance(norm, BatchNorm)]
    return [name for name, norm in norms if _is_untrained(norm)]


def _is_untrained(norm: BatchNorm) -> bool:
    if norm.num_batches_tracked is None or norm.num_batches_tracked:
        return False
    mean, var = running_stats(norm)
    return bool(not mean.any() and (var == 1).all() and (norm.weight is None or norm.weight.any()))


def _few(images: Tensor) -> Tensor:
    """Some images from all over the batch."""
    return images[:: -(-len(images) // EXACT_IMAGES)]


def _foldable(merged: nn.Module, images: Tensor) -> list[Change]:
    """The convolutions that a BN reads: as blocks without side branches they merge as all do."""
    if not any(isinstance(module, BatchNorm) for module in merged.modules()):
        return []
    found = plan(merged, images[:1], family="plain", selection=EVERYTHING)
    return [change for change in found.changes if change.kind == "adapt" or change.norm]


def _error_in_float64(model: nn.Module, blocked: nn.Module, merged: nn.Module, images: Tensor) -> float:
    """The largest relative error of a block, or of the logits; `blocked` is the network with all blocks as such."""
    convs, expected = dict(merged.named_modules()), model(images)
    with _recorded(blocked) as calls:
        blocked(images)
    worst = max((_checked(name, convs[name](x), y, TOLERANCE) for name, x, y in calls), default=0.0)
    found, bound = merged(images), TOLERANCE
    if relative_error(found, expected) > TOLERANCE:
        bound = min(max(TOLERANCE, relative_error(model(images * (1 + NUDGE)), expected)), CEILING)
    return max(worst, _checked("the logits", found, expected, bound))


def _checked(name: str, found: Tensor, wanted: Tensor, bound: float) -> float:
    error = relative_error(found, wanted)
    if not error <= bound:  # also catches nan
        raise MergeError(
            f"merging changed the function at {name}: relative error {error:.1e} in float64; nothing was written"
        )
    return error


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
