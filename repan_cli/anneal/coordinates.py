"""Describe how a restart changes a block's parameters, so that the optimizer's state can be converted.

The weights and gamma of a trunk are coordinates of the function that the block computes. A restart keeps the function
and changes the coordinates, and with them the gradients that the optimizer averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli.anneal.restoration import MOST_GROWTH, TINY_GAMMA, fold_of
from repan_cli.blocks import RepBlock
from repan_cli.blocks.kernel import exact


class CoordinateChange(NamedTuple):
    """The change of a block's coordinates in a restart.

    The new gradient of the trunk's weights is `ratio` (C_out,) times the old one. The new gradient of its gamma is the
    sum of the old gradients of the last gammas in the block, each times its `shares` (C_out,). Without shares it is
    unknown.
    """

    block: RepBlock
    ratio: Tensor
    shares: Mapping[nn.Parameter, Tensor]


class Coordinates(NamedTuple):
    """gamma / sigma of a trunk, (C_out,), and the last gammas in its block, (C_out,) each, in float64."""

    fold: Tensor
    gammas: dict[nn.Parameter, Tensor]


def coordinates_of(block: RepBlock, *, taken_over: bool) -> Coordinates:
    """Return the factor on the trunk's weights, and the last gammas of the branches that the trunk absorbs.

    With `taken_over` false, the trunk absorbs none.
    """
    norms = [getattr(branch, "norm", None) for branch in (block.trunk, *block.branches) if taken_over]
    affine = [norm for norm in norms if isinstance(norm, _BatchNorm) and norm.affine]
    return Coordinates(fold_of(block), {norm.weight: exact(norm.weight) for norm in affine})


def change_since(block: RepBlock, before: Coordinates) -> CoordinateChange:
    """Return how the coordinates changed since `before`.

    The gradient of the trunk's weights is gamma / sigma times that of the merged kernel. Before the restart, the output
    minus its mean was a sum over branches of gamma times a normalized map. Now it is a single product of this kind. So
    gamma' g' = sum gamma g holds for the gradients g of gamma.
    """
    fold, old = fold_of(block), before.fold
    ratio = torch.where(old.abs() > TINY_GAMMA, fold / torch.where(old == 0, 1.0, old), 0.0)
    shares: dict[nn.Parameter, Tensor] = {}
    if (norm := block.trunk.batch_norm) is not None:
        gamma = exact(norm.weight)
        shares = {each: value / gamma for each, value in before.gammas.items()}
    return CoordinateChange(block, ratio.clamp(-MOST_GROWTH, MOST_GROWTH), shares)
