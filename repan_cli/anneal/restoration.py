"""Restore a block: write its merged kernel back into its trunk so that the function is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repan_cli.blocks import FAMILIES, NATIVE, RepBlock
from repan_cli.blocks.kernel import BatchNorm, Kernel, exact, running_stats

TINY_GAMMA = 1e-6
"""The smallest |gamma| that the rule `running` divides by, and the smallest |gamma / sigma| from which momentum is
carried.
"""

MOST_GROWTH = 4.0
"""The largest factor on a channel's norm under `trunk_scale=pace`, which divides by gamma, and on carried momentum."""


class Moments(NamedTuple):
    """Mean and biased variance (C_out,) of `conv(x; K)` over images and positions, in float64."""

    mean: Tensor
    var: Tensor


class TrunkParams(NamedTuple):
    """The parameters and statistics that restoration writes into a trunk, in float64 on the CPU.

    The weight is (C_out, C_in / groups, kh, kw), the rest (C_out,).
    """

    weight: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor


def restore_calibrate(kernel: Kernel, moments: Moments, eps: float, scale: Tensor) -> TrunkParams:
    """Return measured statistics and affine parameters that undo them: exact in eval mode, and preserved in train mode.

    With W = s K: mean = s m, var = s^2 v, gamma = sqrt(s^2 v + eps) / s, beta = b + m. `scale` is s, (C_out,), not 0.
    """
    weight, bias = kernel
    mean, var = moments
    gamma = torch.sqrt(scale**2 * var + eps) / scale
    return TrunkParams(weight * scale.view(-1, 1, 1, 1), scale * mean, scale**2 * var, gamma, bias + mean)


def restore_reset(kernel: Kernel, eps: float) -> TrunkParams:
    """Return a fresh BN that is the identity in eval mode: mean 0, var 1, gamma sqrt(1 + eps), W = K, beta = b."""
    weight, bias = kernel
    ones = torch.ones_like(bias)
    return TrunkParams(weight, torch.zeros_like(bias), ones, (1 + eps) ** 0.5 * ones, bias)


def restore_running(kernel: Kernel, norm: BatchNorm, *, unit_gamma: bool) -> TrunkParams:
    """Restore as in the method's released code: the trunk's BN statistics and gamma stay.

    W = K sigma / gamma, beta = b + mean gamma / sigma.

    With `unit_gamma`, gamma becomes 1. It also becomes 1 in channels whose gamma is too small to divide by.
    """
    weight, bias = kernel
    mean, var, gamma = (exact(part) for part in (*running_stats(norm), norm.weight))
    sigma = torch.sqrt(var + norm.eps)
    gamma = torch.ones_like(gamma) if unit_gamma else torch.where(gamma.abs() < TINY_GAMMA, 1.0, gamma)
    return TrunkParams(weight * (sigma / gamma).view(-1, 1, 1, 1), mean, var, gamma, bias + mean * gamma / sigma)


@torch.no_grad()
def write_trunk(block: RepBlock, kernel: Kernel, trunk: TrunkParams | None) -> None:
    """Copy the parameters into the existing storage: optimizers, DDP and captured graphs keep their references.

    A trunk without BN (`trunk` None) takes the kernel as it is.
    """
    conv, norm = block.trunk.conv, block.trunk.batch_norm
    weight, bias = kernel
    if trunk is not None and norm is not None:
        weight, bias = trunk.weight, torch.zeros_like(bias)
        mean, var = running_stats(norm)
        mean.copy_(trunk.mean)
        var.copy_(trunk.var)
        norm.weight.copy_(trunk.gamma)
        norm.bias.copy_(trunk.beta)
    conv.weight.copy_(weight)
    if conv.bias is not None:
        conv.bias.copy_(bias)
    else:
        assert not bias.any(), "a trunk with neither BN nor bias cannot take a bias"


def fold_of(block: RepBlock) -> Tensor:
    """Return gamma / sigma of the trunk, (C_out,), in float64; 1 without a BN."""
    norm = block.trunk.batch_norm
    if norm is None:
        return torch.ones(block.trunk.conv.out_channels, dtype=torch.float64)
    _, var = running_stats(norm)
    return exact(norm.weight) / torch.sqrt(exact(var) + norm.eps)


def restored_trunk(
    block: RepBlock, kernel: Kernel, rule: str, moments: Moments | None, trunk_scale: str
) -> TrunkParams | None:
    """Apply a restoration rule to the merged kernel; return None for a trunk without BN.

    `moments` are needed for the rule `calibrate`.
    """
    norm = block.trunk.batch_norm
    if norm is None:
        return None
    if rule == "reset":
        return restore_reset(kernel, norm.eps)
    if rule == "running":
        return restore_running(kernel, norm, unit_gamma=unit_gamma(block))
    assert moments is not None, "the rule calibrate has measured every trunk with a BN"
    return restore_calibrate(kernel, moments, norm.eps, _scale(block, kernel, trunk_scale))


def unit_gamma(block: RepBlock) -> bool:
    return block.family != NATIVE and FAMILIES[block.family].unit_gamma


def _scale(block: RepBlock, kernel: Kernel, trunk_scale: str) -> Tensor:
    """Return the factor on each channel of the merged kernel, (C_out,), under `trunk_scale`.

    It is 1 for `merged`, and |W_old| / |K| for `keep` (1 if either is 0). For `pace` it is sigma / gamma, at most
    `MOST_GROWTH` times the factor of `keep`.
    """
    merged = kernel[0].flatten(1).norm(dim=1)
    if trunk_scale == "merged":
        return torch.ones_like(merged)
    old = exact(block.trunk.conv.weight).flatten(1).norm(dim=1)
    keep = torch.where((merged > 0) & (old > 0), old / merged, 1.0)
    if trunk_scale == "keep":
        return keep
    fold = fold_of(block)
    sign = torch.where(fold < 0, -1.0, 1.0)
    return sign / torch.maximum(fold.abs(), 1 / (MOST_GROWTH * keep))
