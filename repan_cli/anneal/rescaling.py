"""Rescale the trunks as a restart would, without one: the control for the effective learning rate.

A convolution before a BN computes the same at every scale of its weights, but a step moves it by lr / |W|^2 (van
Laarhoven, 2017). A restart with `trunk_scale=merged` changes the scale, because it writes the merged kernel K in place
of the weights W. This control changes the scale alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from repan_cli.anneal.calibration import unwrapped
from repan_cli.anneal.restart import RestartReport
from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.blocks.kernel import exact, running_stats
from repan_cli.errors import InputError


@torch.no_grad()
def rescale(model: nn.Module, *, only: Collection[str] | None = None) -> RestartReport:
    """Scale each channel of each trunk to the norm of its merged kernel, in place; every branch stays.

    The function stays the same in eval mode. In train mode it changes by the part that eps has in the variance. A
    trunk without an affine BN stays as it is: its scale is part of the function.

    Args:
        model: the network, changed in place.
        only: the names of the blocks to rescale, as `blocks.rep_blocks` gives them; None means all.

    Raises InputError if no block has a trunk with an affine BN.
    """
    blocks = [block for name, block in rep_blocks(unwrapped(model)) if only is None or name in only]
    scaled = [block for block in blocks if (norm := block.trunk.batch_norm) is not None and norm.affine]
    if not scaled:
        raise InputError("no block has a trunk with an affine BN, so there is nothing to rescale")
    for block in scaled:
        _scale_trunk(block, _scale_of_merging(block))
    return RestartReport(len(scaled))


def _scale_of_merging(block: RepBlock) -> Tensor:
    """Return |K| / |W| of each channel, (C_out,), in float64; 1 where either is 0."""
    weights = block.sum_kernel()[0], exact(block.trunk.conv.weight)
    merged, trunk = (weight.flatten(1).norm(dim=1) for weight in weights)
    return torch.where((merged > 0) & (trunk > 0), merged / trunk, 1.0)


def _scale_trunk(block: RepBlock, scale: Tensor) -> None:
    """Multiply a trunk's weights by `scale`, (C_out,), and convert its BN: W = s W, mean = s m, var = s^2 v.

    gamma takes sqrt(s^2 v + eps) / (s sqrt(v + eps)), which is 1 but for eps.
    """
    conv, norm = block.trunk.conv, block.trunk.batch_norm
    assert norm is not None
    mean, var = running_stats(norm)
    old, new = exact(var), scale**2 * exact(var)
    conv.weight.copy_(exact(conv.weight) * scale.view(-1, 1, 1, 1))
    if conv.bias is not None:
        conv.bias.copy_(exact(conv.bias) * scale)
    mean.copy_(exact(mean) * scale)
    var.copy_(new)
    norm.weight.copy_(exact(norm.weight) * torch.sqrt(new + norm.eps) / (scale * torch.sqrt(old + norm.eps)))
