"""Describe the changes that turn convolutions of a network into blocks, and carry them out."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from repan_cli.blocks import NATIVE, RepBlock, block_around, reinit_branches
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.checkpoint.card import Change, ModelCard, Structure
from repan_cli.errors import InputError
from repan_cli.models.norms import split_norm
from repan_cli.models.sums import merge
from repan_cli.models.timm_blocks import adapt
from repan_cli.system.copies import modules_of


class NotChosen(str):
    """The reason why a convolution that might become a block was not chosen. All other reasons mean that it cannot."""

    __slots__ = ()

    def __new__(cls, why: str) -> NotChosen:
        return super().__new__(cls, f"not chosen: {why}")


@dataclass(frozen=True)
class Selection:
    """The choice of convolutions that become blocks, or of blocks that restart.

    Args:
        kernel: the sizes of the larger side of the kernel; empty means all above 1, None means all.
        include: globs of layer names; empty means all.
        exclude: globs of layer names to skip.
        limit: the largest number of blocks; layers with the most weights come first.
    """

    kernel: tuple[int, ...] | None = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = None

    def left_out(self, convs: Mapping[str, nn.Conv2d]) -> dict[str, NotChosen]:
        """Return the convolutions that are not chosen, by name, each with the reason."""
        reasons = {name: reason for name, conv in convs.items() if (reason := self._reason(name, conv))}
        chosen = sorted((name for name in convs if name not in reasons), key=lambda name: -convs[name].weight.numel())
        if self.limit is not None:
            reasons |= dict.fromkeys(chosen[self.limit :], NotChosen(f"beyond block.limit={self.limit}"))
        return reasons

    def _reason(self, name: str, conv: nn.Conv2d) -> NotChosen | None:
        size = max(conv.kernel_size)
        if self.include and not _matches(name, self.include):
            return NotChosen("no name in block.include")
        if _matches(name, self.exclude):
            return NotChosen("a name in block.exclude")
        if self.kernel is None or size in self.kernel or (not self.kernel and size > 1):
            return None
        wanted = "[" + ",".join(map(str, self.kernel)) + "]" + ("" if self.kernel else ", all above 1")
        return NotChosen(f"kernel {'x'.join(map(str, conv.kernel_size))}, block.kernel is {wanted}")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


EVERYTHING = Selection(kernel=None, include=("*",))


@dataclass(frozen=True)
class Expansion:
    """The planned blocks of a network: their family, the changes, and why other convolutions stay as they are."""

    family: str
    changes: tuple[Change, ...]
    left: Mapping[str, str]

    def after(self, earlier: Expansion | None) -> Expansion:
        """Return this expansion joined with the earlier one of the same network."""
        return dataclasses.replace(self, changes=(*earlier.changes, *self.changes)) if earlier else self

    def structure(self, native: Mapping[str, Any]) -> Structure:
        """Return the expansion as a checkpoint describes it, with the arguments of a network built of blocks."""
        left = {name: str(reason) for name, reason in self.left.items()}
        return Structure(self.changes, left, dict(native))

    @classmethod
    def from_card(cls, card: ModelCard) -> Expansion:
        """Read the expansion from the description in a checkpoint."""
        return cls(card.block or NATIVE, card.structure.changes, card.structure.left)


def summary(left: Mapping[str, str]) -> str:
    """Summarize why convolutions stay as they are: the most frequent reason first, each with one layer's name."""
    if not left:
        return "it has none"
    first = {reason: name for name, reason in reversed(list(left.items()))}
    counted = Counter(left.values()).most_common(3)
    return "; ".join(f"{first[reason]}{f' and {n - 1} more' if n > 1 else ''}: {reason}" for reason, n in counted)


def report_of(model: nn.Module) -> Expansion | None:
    """Return the `repan_report` of a network; None if it was not changed after it was built."""
    found = getattr(model, "repan_report", None)
    return found if isinstance(found, Expansion) else None


def changes_of(model: nn.Module) -> tuple[Change, ...]:
    """Return the changes that made a network's blocks; an empty tuple if it was not changed after it was built."""
    report = report_of(model)
    return report.changes if report else ()


def set_report(model: nn.Module, report: Expansion) -> None:
    """Store the record of changes on a network, as its `repan_report`."""
    vars(model)["repan_report"] = report  # neither parameter, buffer nor module


# ---------------------------------------------------------------------------------------------- carrying out


def apply(model: nn.Module, changes: Iterable[Change], *, attach: str = "ramp", whole: bool = False) -> nn.Module:
    """Make the changes in a network, in place, and return it. Fresh branches draw from the global generator.

    Sums of branches become convolutions, or with `whole` layers that compute the sum as before. If the network itself
    computes the sum, a new network is returned.
    """
    for (kind, name), same in itertools.groupby(changes, key=lambda change: change[:2]):
        module = model.get_submodule(name)
        if kind == "merge":
            places = [change.norm for change in same if change.norm is not None]
            model = put(model, name, merge(module, places, whole=whole))
            continue
        for change in same:
            _make_block(model, model.get_submodule(name), change, attach)
    return model


def _make_block(model: nn.Module, module: nn.Module, change: Change, attach: str) -> None:
    if change.kind == "adapt":
        put(model, change.name, adapt(module))
        return
    block = _block_of(model, module, change)
    put(model, change.name, block)
    norm = block.trunk.batch_norm
    zero_start = norm is not None and not norm.weight.any()
    reinit_branches(block, "zero-gamma" if attach == "one" and zero_start else attach)


def _block_of(model: nn.Module, module: nn.Module, change: Change) -> RepBlock:
    """Build the block around the trunk of one without side branches, or around a convolution and its BN."""
    if change.family is None:
        raise InputError(f"the change of {change.name} names no block family")
    norm: BatchNorm | None = None
    if change.kind == "grow":
        trunk = cast("RepBlock", module).trunk
        conv, norm = trunk.conv, trunk.batch_norm
    else:
        conv = module.reparameterize() if isinstance(module, RepBlock) else cast("nn.Conv2d", module)
        if change.norm is not None:
            before = model.get_submodule(change.norm)
            missing = [name for name in ("weight", "bias") if getattr(before, name, None) is None]
            norm, rest = split_norm(before)
            for name in missing:
                getattr(norm, name).requires_grad_(conv.weight.requires_grad)
            put(model, change.norm, rest.train(norm.training))
        elif conv.bias is None:  # the branches' BN will need one when they are merged
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), conv.weight.requires_grad)
    return block_around(conv, norm, change.family, copies=change.copies)


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace a module, under its name and under all others that it has, and return the network.

    The name '' replaces the network itself.
    """
    if not name:
        return module
    old = model.get_submodule(name)
    for parent in modules_of(model, {}):
        for key, child in [*parent._modules.items()]:
            if child is old:
                setattr(parent, key, module)
    return model
