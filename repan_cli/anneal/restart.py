"""Restart a network between two annealing cycles: the method of the paper.

RepAn, "Enhanced Annealing through Re-parameterization" (CVPR 2024), has three steps. Merge every block (Rep).
Re-initialize its side branches (expansion). Write the merged kernel back into the trunk so that the function is kept
(restoration). Then training continues.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repan_cli.anneal.calibration import ChannelSums, MergedProbe, calibrate, calibrate_branch_norms, through
from repan_cli.anneal.coordinates import CoordinateChange, change_since, coordinates_of
from repan_cli.anneal.restoration import TINY_GAMMA, Moments, restored_trunk, unit_gamma, write_trunk
from repan_cli.blocks import RepBlock, chosen_blocks, reinit_branches
from repan_cli.blocks.kernel import Kernel
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.copies import unwrapped
from repan_cli.system.images import ImagesLike, image_batches

CHOICES = {
    "rule": ("calibrate", "running", "reset"),
    "attach": ("zero-gamma", "compensated", "ramp", "one"),
    "branch_init": ("kaiming", "small"),
    "trunk_scale": ("pace", "keep", "merged"),
}
"""The values that `restart` accepts for these arguments; the settings `cycle.*` of the same names accept the same."""


@dataclass(frozen=True)
class RestartReport:
    """The outcome of a restart.

    Attributes:
        blocks: the number of blocks that restarted.
        zero_gammas: the number of channels in which the rule `running` replaced a gamma near zero by 1.
        changes: how the coordinates of each block changed, for `optim.carry_momentum`.
    """

    blocks: int
    zero_gammas: int = 0
    changes: tuple[CoordinateChange, ...] = ()


def restart(
    model: nn.Module,
    *,
    rule: str = "calibrate",
    images: ImagesLike = (),
    attach: str = "zero-gamma",
    branch_init: str = "kaiming",
    trunk_scale: str = "pace",
    only: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> RestartReport:
    """Merge, regrow and restore every block, in place on the same parameters.

    The function in eval mode stays the same, except with `attach="one"`, which adds the fresh branches at once. With
    the rule `calibrate` the function in train mode stays the same too, up to the difference between `images` and the
    training batches. A block without a BN in its trunk takes the merged kernel unchanged. Afterward zero the
    optimizer's momentum, or convert it with the report's `changes`.

    Args:
        model: the network, changed in place.
        rule: the restoration rule: `calibrate`, `running` (as released) or `reset`.
        images: 1,000 or more images as training sees them, on which `calibrate` measures. A tensor (N, C, H, W), a
            batch, or an iterable of batches such as a loader of (images, labels).
        attach: how fresh branches start. `ramp` sets attach rate 0, at which they do not train. The others set 1:
            `zero-gamma` with silent branches, `compensated` with branches that the trunk offsets, `one` as they are.
        branch_init: the weights of the fresh branches, `kaiming` or `small`.
        trunk_scale: under `calibrate`, `pace` scales each channel of the merged kernel to the trunk's old gamma / sigma
            (a step then moves it as before), `keep` to its old norm. `merged` writes the kernel as it is.
        only: the names of the blocks to restart, as `blocks.rep_blocks` gives them; None means all.
        generator: the random generator for the fresh weights.

    Raises InputError for an unknown choice or block, a model without blocks, or if `calibrate` got no images.
    """
    for key, value in (("rule", rule), ("attach", attach), ("branch_init", branch_init), ("trunk_scale", trunk_scale)):
        choices = CHOICES[key]
        if value not in choices:
            hint = did_you_mean(str(value), choices) or f": {', '.join(choices)}"
            raise InputError(f"{key}='{value}' is not a choice{hint}")
    if not isinstance(model, nn.Module):
        raise InputError(f"restart works in place, on a network, not on {model!r}: load it first, by repan_cli.load")
    model = unwrapped(model)
    blocks = chosen_blocks(model, only)
    if not blocks:
        raise InputError("the network has no re-parameterizable block to restart: call repan_cli.expand first")
    before = {name: coordinates_of(block, taken_over=attach != "compensated") for name, block in blocks.items()}
    if attach == "compensated":
        kernels, moments = _compensated(model, blocks, list(image_batches(images)), branch_init, generator)
    else:
        kernels = {name: block.sum_kernel() for name, block in blocks.items()}
        moments = calibrate(model, images) if rule == "calibrate" else {}
    zero_gammas, changes = 0, []
    for name, block in blocks.items():
        if rule == "running" and not unit_gamma(block) and (norm := block.trunk.batch_norm) is not None:
            zero_gammas += int((norm.weight.abs() < TINY_GAMMA).sum())
        trunk = restored_trunk(block, kernels[name], rule, moments.get(name), trunk_scale)
        write_trunk(block, kernels[name], trunk)
        if attach != "compensated":
            reinit_branches(block, attach, branch_init=branch_init, generator=generator)
        changes.append(change_since(block, before[name]))
    return RestartReport(len(blocks), zero_gammas, tuple(changes))


@torch.no_grad()
def _compensated(
    model: nn.Module,
    blocks: Mapping[str, RepBlock],
    images: list[Tensor],
    branch_init: str,
    generator: torch.Generator | None,
) -> tuple[dict[str, Kernel], dict[str, Moments]]:
    """Build fresh side branches that are active from the first step; return the kernels and moments left to the trunks.

    Every BN in a branch gets the statistics of its input, and each branch's output the standard deviation of the
    block's. A last pass over the images measures `conv(x; K - sum K_i)`, the trunk's part.
    """
    probe = MergedProbe(model)
    probe.run(images[:1], dict.fromkeys(blocks, lambda x, y: None))  # an error leaves the network as it was
    left = {name: block.sum_kernel() for name, block in blocks.items()}
    for block in blocks.values():
        reinit_branches(block, "one", branch_init=branch_init, generator=generator)
    spreads = calibrate_branch_norms(probe, blocks, images)
    for name, block in blocks.items():
        for branch in block.sides:
            branch.match_scale(left[name][0], spreads[name])
        left[name] = block.without_branches(left[name])
    sums = {name: ChannelSums() for name, block in blocks.items() if block.trunk.has_norm}
    trunks = {name: blocks[name].merged((left[name][0], torch.zeros_like(left[name][1]))) for name in sums}
    probe.run(images, {name: through(trunks[name], collect) for name, collect in sums.items()})
    return left, {name: collect.moments(torch.zeros(())) for name, collect in sums.items()}
