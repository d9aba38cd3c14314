"""Define block families: functions from the block's geometry to its side branches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from repan_cli.blocks.branches import (
    Branch,
    ConvBN,
    IdentityBN,
    PointwiseAverageBN,
    PointwiseConvBN,
    ScaledIdentity,
    conv_bn,
)
from repan_cli.blocks.geometry import Geometry
from repan_cli.blocks.kernel import BatchNorm, size_of
from repan_cli.blocks.rep_block import RepBlock
from repan_cli.errors import InputError
from repan_cli.registry import Registry

AnyModule = TypeVar("AnyModule", bound=nn.Module)

NATIVE = "own"
"""The `RepBlock.family` of a network's own multi-branch blocks."""


class Family(NamedTuple):
    """A block family. `branches` builds the side branches for a geometry.

    `post_norm` is true if the only BN is after the sum. `unit_gamma` is a detail of the released restoration rule
    `running`.
    """

    branches: Callable[..., list[Branch]]
    text: str
    post_norm: bool = False
    unit_gamma: bool = False


FAMILIES: Registry[Family] = Registry("block family")

BranchesOf = Callable[..., list[Branch]]


def family(name: str, *, post_norm: bool = False, unit_gamma: bool = False) -> Callable[[BranchesOf], BranchesOf]:
    """Register a function from geometry to branches; its docstring is the text in lists."""

    def enter(branches: BranchesOf) -> BranchesOf:
        text = " ".join((branches.__doc__ or "").split())
        FAMILIES.register(name)(Family(branches, text, post_norm, unit_gamma))
        return branches

    return enter


def check_family(name: str, copies: int | None = None) -> None:
    """Raise InputError for a family that does not exist, or that has a fixed number of branches."""
    build = FAMILIES[name].branches
    if copies is not None and "copies" not in inspect.signature(build).parameters:
        raise InputError(f"block.branches={copies}: the block family {name} has a fixed number of branches")
    if copies is not None and copies < 1:
        raise InputError(f"block.branches={copies}: give at least 1")


def side_branches(name: str, geometry: Geometry, copies: int | None = None) -> list[Branch]:
    """Build fresh side branches of the family `name`; `copies` sets their number in families that allow a choice."""
    check_family(name, copies)
    build = FAMILIES[name].branches
    return build(geometry) if copies is None else build(geometry, copies=copies)


def make_block(name: str, geometry: Geometry, *, copies: int | None = None) -> RepBlock:
    """Build a fresh block of the family `name`. Raises InputError for a family that does not exist."""
    post_norm = FAMILIES[name].post_norm
    trunk = conv_bn(geometry, norm=not post_norm)
    branches = side_branches(name, geometry, copies)
    return RepBlock(
        trunk, branches, family=name, post_norm=nn.BatchNorm2d(geometry.out_channels) if post_norm else None
    )


def block_around(conv: nn.Conv2d, norm: BatchNorm | None, name: str, *, copies: int | None = None) -> RepBlock:
    """Make a block of the family `name` around an existing convolution as trunk, with its BN if it has one.

    The side branches are fresh, on the convolution's device, in its dtype and memory format.
    """
    behind = norm is not None and FAMILIES[name].post_norm
    trunk = ConvBN(conv, None if behind else norm, canvas=size_of(conv.kernel_size))
    sides = [] if name == "plain" else side_branches(name, Geometry.of(conv), copies)
    block = RepBlock(trunk, sides, family=name, post_norm=norm if behind else None)
    return fitted(block, [conv, *([] if norm is None else [norm])])


def fitted(block: RepBlock, kept: Iterable[nn.Module]) -> RepBlock:
    """Give the new parts of a block the device, dtype, memory format and mode of its convolution.

    The layers `kept`, which the network had before, stay as they are, such as BN in float32 behind a convolution in
    bfloat16, or BN in eval mode in a network that trains. New BN get the dtype of the block's BN. If that is a
    SyncBatchNorm, they are, too.
    """
    conv, norm = block.trunk.conv, block.trunk.batch_norm or block.post_norm
    dtype = norm.weight.dtype if isinstance(norm, BatchNorm) else conv.weight.dtype
    old = {id(part) for layer in kept for part in layer.modules()}
    for number, branch in enumerate(block.branches):
        if old.isdisjoint(map(id, branch.modules())):
            placed_as(conv.weight, branch)
            if isinstance(norm, nn.SyncBatchNorm) and not isinstance(branch, BatchNorm):
                block.branches[number] = nn.SyncBatchNorm.convert_sync_batchnorm(branch, norm.process_group)
            for part in branch.modules():
                if isinstance(part, BatchNorm):
                    part.to(dtype)
    block.attach_rate = block.attach_rate.to(conv.weight)
    for part in block.modules():
        if id(part) not in old:
            part.training = conv.training
    return block


def placed_as(weight: Tensor, module: AnyModule) -> AnyModule:
    """Move a module to the device, dtype and memory format of a convolution's weight (C_out, C_in / g, kh, kw)."""
    moved = module.to(weight.device, weight.dtype)
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return moved.to(memory_format=torch.channels_last) if channels_last else moved


@family("plain")
def plain(geometry: Geometry) -> list[Branch]:
    """No side branch: one conv + BN, the control."""
    return []


@family("rep")
def rep(geometry: Geometry) -> list[Branch]:
    """1x1 + BN."""
    return [conv_bn(geometry, (1, 1))]


@family("repvgg")
def repvgg(geometry: Geometry) -> list[Branch]:
    """1x1 + BN, and an identity BN where the shape is kept (RepVGG, Ding et al. 2021)."""
    return [*rep(geometry), *([IdentityBN(geometry)] if geometry.keeps_shape else [])]


@family("acb", unit_gamma=True)
def acb(geometry: Geometry) -> list[Branch]:
    """1 x k + BN and k x 1 + BN (ACNet, Ding et al. 2019)."""
    height, width = geometry.kernel_size
    return [conv_bn(geometry, (1, width)), conv_bn(geometry, (height, 1))]


@family("dbb", unit_gamma=True)
def dbb(geometry: Geometry) -> list[Branch]:
    """1x1 + BN; 1x1 + BN, k x k + BN; 1x1 + BN, average pooling + BN (Diverse Branch Block, Ding et al. 2021)."""
    return [conv_bn(geometry, (1, 1)), PointwiseConvBN(geometry), PointwiseAverageBN(geometry)]


@family("mobileone")
def mobileone(geometry: Geometry, copies: int = 3) -> list[Branch]:
    """3 more k x k + BN (block.branches), 1x1 + BN, and an identity BN where the shape is kept (MobileOne, Vasu et al.
    2023).
    """
    small = [conv_bn(geometry, (1, 1))] if max(geometry.kernel_size) > 1 else []
    identity = [IdentityBN(geometry)] if geometry.keeps_shape else []
    return [*(conv_bn(geometry) for _ in range(copies)), *small, *identity]


@family("qarep", post_norm=True)
def qarep(geometry: Geometry) -> list[Branch]:
    """1x1 and a scaled identity without BN, and one BN after the sum: friendly to int8 (QARepVGG, Chu et al. 2022)."""
    identity = [ScaledIdentity(geometry)] if geometry.keeps_shape else []
    return [conv_bn(geometry, (1, 1), norm=False), *identity]


SHIPPED = frozenset(FAMILIES)
"""The families of this package; all others are user-defined, see `user_block`."""
