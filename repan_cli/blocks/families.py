"""Block families: each a function from the block's geometry to its side branches, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from repan_cli.blocks.branch import Branch, ConvBN, Geometry, IdentityBN
from repan_cli.blocks.rep_block import RepBlock
from repan_cli.registry import Registry


class Family(NamedTuple):
    """`branches` builds the side branches; `unit_gamma` is a detail of the released restoration rule `running`."""

    branches: Callable[[Geometry], list[Branch]]
    text: str
    unit_gamma: bool = False


FAMILIES: Registry[Family] = Registry("block family")


def family(
    name: str, *, unit_gamma: bool = False
) -> Callable[[Callable[[Geometry], list[Branch]]], Callable[[Geometry], list[Branch]]]:
    """Enter a function from geometry to branches into the registry, its docstring as the text."""

    def enter(branches: Callable[[Geometry], list[Branch]]) -> Callable[[Geometry], list[Branch]]:
        FAMILIES.register(name)(Family(branches, " ".join((branches.__doc__ or "").split()), unit_gamma))
        return branches

    return enter


def make_block(name: str, geometry: Geometry) -> RepBlock:
    """A fresh block of the family `name`. Raises InputError for a family that does not exist."""
    return RepBlock(ConvBN(geometry), FAMILIES[name].branches(geometry), family=name)


@family("plain")
def plain(geometry: Geometry) -> list[Branch]:
    """No side branch: one conv + BN, the control."""
    return []


@family("rep")
def rep(geometry: Geometry) -> list[Branch]:
    """1x1 + BN."""
    return [ConvBN(geometry, (1, 1))]


@family("repvgg")
def repvgg(geometry: Geometry) -> list[Branch]:
    """1x1 + BN, and an identity BN where the shape is kept (RepVGG, Ding et al. 2021)."""
    return [*rep(geometry), *([IdentityBN(geometry)] if geometry.keeps_shape else [])]


@family("acb", unit_gamma=True)
def acb(geometry: Geometry) -> list[Branch]:
    """1 x k + BN and k x 1 + BN (ACNet, Ding et al. 2019)."""
    height, width = geometry.kernel_size
    return [ConvBN(geometry, (1, width)), ConvBN(geometry, (height, 1))]
