"""Merge a multi-branch network into a plain one, fold every BN, and prove the result equal before anything is
written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from repan_cli.blocks import NATIVE, RepBlock, rep_blocks, reparameterize
from repan_cli.blocks.kernel import BatchNorm, running_stats
from repan_cli.errors import InputError
from repan_cli.export.proof import TOLERANCE, Errors, changed, errors_of
from repan_cli.models.changes import Expansion, apply, report_of, set_report
from repan_cli.models.merging import MergePlan, place_of, plan_merge
from repan_cli.models.outputs import Leaves, difference, leaves
from repan_cli.models.probe import copied
from repan_cli.models.rebuild import NothingIsDrawn, load
from repan_cli.models.twins import cut, twin
from repan_cli.system.copies import unwrap_parts, unwrapped
from repan_cli.system.images import ImagesLike, first_batch
from repan_cli.system.notices import doing
from repan_cli.system.text import count, first_line

PROOF_IMAGES = 8
"""Images of each kind (random, real) on which a merge is proven.

In float64, which takes longer, only `EXACT_IMAGES`.
"""

EXACT_IMAGES = 2

SUSPICIOUS = 1e-3
"""Error in float32 above which whole images are also compared in float64. Correct merges have 1e-6."""


@dataclass(frozen=True)
class FuseReport:
    """The agreement of the merged network with the original, and the savings.

    Attributes:
        rel_error_fp64: the largest relative error in float64, of the blocks and of the outputs.
        rel_error_fp32: the relative error of the outputs in float32.
        blocks: the number of blocks and other sums of branches that became one convolution.
        folded: the number of convolutions that absorbed the norm after them, merged ones included.
        params_before: the number of parameters; `params_after` that of the merged network.
        gmacs_before: billions of multiplications in convolutions and matrix products for one image; `gmacs_after` those
            of the merged network.
        seconds: the time of the merge with its proof.
        left: the reason why a layer stays, by its name.
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
    left: Mapping[str, str] = field(default_factory=dict)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one image (1, C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton where that is installed

    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@torch.no_grad()
def fuse(model: nn.Module | str | Path, images: ImagesLike) -> tuple[nn.Module, FuseReport]:
    """Return a merged float32 copy of a network on the CPU, in eval mode, and the proof that it is equal.

    Every block becomes one convolution. So does every sum of convolutions, BN, average pooling and similar layers with
    one input, in any module. Every other convolution absorbs the BN that reads it.

    The proof uses float64 copies with unrounded merged kernels. Every block on its own input, and all outputs of the
    network, must agree to a relative error of 1e-10. For a network that amplifies rounding, the limit on its outputs is
    as large as the effect of scaling the images by 1 + 1e-13, up to 1e-4. The float32 error is reported as well.

    Args:
        model: a network with blocks, or with convolutions followed by a BN; or a file or a run's folder, as for `load`.
            It is not changed. It may return a tensor, or dictionaries, lists and tuples of them.
        images: images (N, C, H, W) to compare on, a batch of a loader, or a loader, whose first batch is taken.

    Returns the network, whose `repan_report` records how it was made from a plain one, and the report.

    Raises MergeError if the two networks disagree, InputError if there is nothing to merge or a weight is not finite.
    """
    began = time.perf_counter()
    if not isinstance(model, nn.Module):
        model = load(model)
    model = unwrapped(model)
    images = first_batch(images).detach().cpu().float()
    check_finite(model)
    exact = unwrap_parts(copied(model)).cpu().float().double().eval()
    blocks = [name for name, _ in rep_blocks(exact)]
    try:
        found = plan_merge(exact, images.double())
    except Exception as error:  # a user's forward may raise anything
        shape = "x".join(map(str, images.shape))
        raise InputError(f"the network does not run on images of shape {shape}: {first_line(error)}") from error
    if not blocks and not found.changes:
        raise InputError("there is nothing to merge: no block, and no BN after a convolution")
    few = _few(images, EXACT_IMAGES)
    small = cut(found.adapted, few.double())
    with doing(f"proving the merged network equal in float64, {count(len(blocks) + len(found.changes), 'place')}"):
        merged, found, errors = _proven(exact, found, small)
    report = _report_of(merged, exact, found, (images[:1], small), errors, began)
    if not report.rel_error_fp32 <= SUSPICIOUS and small.shape[-2:] != images.shape[-2:]:
        merged, found, errors = _proven(exact.double(), found, few.double())
        report = _report_of(merged, exact, found, (images[:1], *few.split(1)), errors, began)
    before = report_of(model) or Expansion(NATIVE, (), {})
    set_report(merged, dataclasses.replace(before, changes=(*before.changes, *found.changes)))
    return merged, report


def _report_of(
    merged: nn.Module, exact: nn.Module, found: MergePlan, batches: Iterable[Tensor], errors: Errors, began: float
) -> FuseReport:
    """Round both networks to float32, in place, and compare them on batches. The first batch is one whole image."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton where that is installed

    merging = {name for name, _ in rep_blocks(found.adapted)} | {place_of(change) for change in found.sums}
    folded = {place_of(change) for change in found.folds}
    merged.float()
    exact.float()
    first, *others = (batch.float() for batch in batches)
    with FlopCounterMode(display=False) as before:
        expected = errors.compared(exact, first)
    with FlopCounterMode(display=False) as after:
        single = difference(errors.compared(merged, first), expected)
    for batch in others:
        single = max(single, difference(errors.compared(merged, batch), errors.compared(exact, batch)))
    return FuseReport(
        rel_error_fp64=max([*errors.of_blocks.values(), *errors.of_outputs.values()], default=0.0),
        rel_error_fp32=single,
        blocks=len(errors.of_blocks.keys() - (folded - merging)),
        folded=len(folded),
        params_before=count_parameters(exact),
        params_after=count_parameters(merged),
        gmacs_before=before.get_total_flops() // 2 / 1e9,
        gmacs_after=after.get_total_flops() // 2 / 1e9,
        seconds=time.perf_counter() - began,
        left=found.left,
    )


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming the first weight or statistic that is not finite."""
    for name, value in model.state_dict().items():
        if nn.parameter.is_lazy(value):
            raise InputError(f"'{name}' has no values yet: run the network once, on images, before it is merged")
        if value.is_floating_point() and not _is_finite(value):
            raise InputError(
                f"'{name}' holds values that are not finite: the network has diverged; use an earlier checkpoint"
            )


def _is_finite(value: Tensor) -> bool:
    """Return whether all values are finite. Their sum tells it in a fifth of the time, unless it overflows."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def untrained_norms(model: nn.Module) -> list[str]:
    """Return, by name, the BN that have never seen a batch, so that their statistics are the initial ones."""
    norms = [(name, norm) for name, norm in model.named_modules() if isinstance(norm, BatchNorm)]
    return [name for name, norm in norms if _is_untrained(norm)]


def _is_untrained(norm: BatchNorm) -> bool:
    if norm.num_batches_tracked is None or norm.num_batches_tracked:
        return False
    mean, var = running_stats(norm)
    return bool(not mean.any() and (var == 1).all() and (norm.weight is None or norm.weight.any()))


def _few(images: Tensor, number: int) -> Tensor:
    """Return some images from across the batch."""
    return images[:: -(-len(images) // number)]


# ---------------------------------------------------------------------------------------------- the proof


def _proven(exact: nn.Module, found: MergePlan, images: Tensor) -> tuple[nn.Module, MergePlan, Errors]:
    """Return the merged network in float64, the plan without changes that alter the function, and the errors.

    Raises MergeError if a block of repan or timm does not merge exactly.
    """
    expected, searched = leaves(exact(images)), False
    while True:
        merged = _merged(found)
        errors = errors_of(merged, exact, found, images, expected)
        wrong = {name: error for name, error in errors.of_blocks.items() if not error <= TOLERANCE}
        chosen = {place_of(change) for change in (*found.sums, *found.folds)}
        for name in wrong.keys() - chosen:
            raise changed(name, wrong[name])
        if wrong:
            found = found.without(dict.fromkeys(wrong, NOT_THE_SAME))
        elif errors.problem is None:
            return merged, found, errors
        elif searched or not chosen:
            raise errors.problem
        else:
            found, searched = _searched(exact, found, images, expected), True


NOT_THE_SAME = "as one convolution it changes the network's function"


def _merged(found: MergePlan) -> nn.Module:
    with NothingIsDrawn():
        merged = twin(found.adapted, blocks=RepBlock.reparameterize)
        return reparameterize(apply(merged, (*found.sums, *found.folds)))


def _searched(exact: nn.Module, found: MergePlan, images: Tensor, expected: Leaves) -> MergePlan:
    """Return the plan without the changes that alone or together alter the function, found by bisection."""
    kept: set[str] = set()
    names = [place_of(change) for change in (*found.sums, *found.folds)]
    pending = [names]
    while pending:
        tried = pending.pop()
        others = set(names) - kept - set(tried)
        plan = found.without(dict.fromkeys(others, NOT_THE_SAME))
        if errors_of(_merged(plan), exact, plan, images, expected).problem is None:
            kept |= set(tried)
        elif len(tried) > 1:
            middle = len(tried) // 2
            pending += [tried[middle:], tried[:middle]]
    return found.without(dict.fromkeys([name for name in names if name not in kept], NOT_THE_SAME))
