"""Plan a merge beyond existing blocks: timm's own blocks, sums of branches, and BN layers after convolutions.

Planning watches forward passes on the meta device, which cost no arithmetic. The proof in float64 follows when the plan
is carried out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repan_cli.blocks import rep_blocks
from repan_cli.checkpoint.card import Change
from repan_cli.models import sums
from repan_cli.models.changes import EVERYTHING, apply
from repan_cli.models.expand import to_expand
from repan_cli.models.norms import is_norm
from repan_cli.models.observing import Observed, observe
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.models.twins import twin, without_arithmetic
from repan_cli.system.text import first_line


@dataclass
class MergePlan:
    """The changes that merge a network, in order. `left` gives the reason for each layer that stays, by its name.

    `adapted` is the network with timm's own multi-branch blocks as `RepBlock`s, on the same tensors.
    """

    adapted: nn.Module
    own: list[Change] = field(default_factory=list)
    sums: list[Change] = field(default_factory=list)
    folds: list[Change] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[Change, ...]:
        return (*self.own, *self.sums, *self.folds)

    def without(self, names: dict[str, str]) -> MergePlan:
        """Return the plan without the changes at some places, for the given reasons."""

        def rest(changes: list[Change]) -> list[Change]:
            return [change for change in changes if place_of(change) not in names]

        return MergePlan(self.adapted, rest(self.own), rest(self.sums), rest(self.folds), {**self.left, **names})


def place_of(change: Change) -> str:
    """Return the name of the convolution that a change makes; for timm's own blocks, the name of the block."""
    if change.kind != "merge":
        return change.name
    return f"{change.name}.{change.norm}" if change.name else str(change.norm)


@torch.no_grad()
def plan_merge(model: nn.Module, images: Tensor) -> MergePlan:
    """Plan the merge of a network in eval mode, without changing it; `images` (N, C, H, W) are sample inputs."""
    found, one = MergePlan(model), images[:1]
    if any(map(is_own_block, model.modules())):
        found.adapted = twin(model)
        for name, module in list(found.adapted.named_modules()):
            if is_own_block(module):
                _adapt(found.adapted, name, found)
    seen = without_arithmetic(found.adapted, one, _look)
    merged = _with_sums(found, seen.pass_)
    if found.sums:
        try:
            seen = without_arithmetic(merged, one, _look)
        except Exception:  # a network that lost a layer may raise anything
            merged = _without_misfits(found, one)
            seen = without_arithmetic(merged, one, _look)
    found.folds = _folds(merged, seen, found)
    return found


class _Seen(NamedTuple):
    """The findings of one forward pass: the convolutions into which a norm may be folded, and why others may not, by
    the name of the norm.
    """

    pass_: Observed
    wanted: list[Change]
    why_not: dict[str, str]


def _look(model: nn.Module, images: Tensor) -> _Seen:
    seen, sightings = observe(model, images)
    wanted, left = to_expand(model, sightings, "plain", EVERYTHING, trains=False)
    names = {module: name for name, module in model.named_modules()}
    reads = {names[norm]: left.get(names[conv]) for conv, norms in sightings.norms.items() for norm in norms}
    return _Seen(seen, wanted, {name: why for name, why in reads.items() if why is not None})


def _adapt(model: nn.Module, name: str, found: MergePlan) -> None:
    change = Change("adapt", name)
    try:
        apply(model, [change])
        found.own.append(change)
    except ValueError as error:
        found.left[name] = str(error)


def _with_sums(found: MergePlan, seen: Observed) -> nn.Module:
    """Return the network with its sums merged, the innermost modules first."""
    model = found.adapted
    blocks = {name for name, _ in rep_blocks(model)}
    for name in sorted(seen.adders.keys() - blocks, key=lambda name: (-name.count(".") - bool(name), name)):
        module = model.get_submodule(name)
        try:
            places, left = _sums_of(module, seen, name)
        except ValueError as error:
            if seen.adders[name]:
                found.left[name or type(module).__name__] = f"a sum of branches stays: {error}"
            continue
        for place, reason in left.items():
            found.left[f"{name}.{place}" if name else place] = f"its sum stays: {reason}"
        changes = [Change("merge", name, place) for place in places]
        if changes:
            model = apply(twin(model, blocks=lambda block: block) if model is found.adapted else model, changes)
        found.sums += changes
    return model


def _without_misfits(found: MergePlan, images: Tensor) -> nn.Module:
    """Return the network with those sums merged with which it still runs; the others leave the plan.

    A module may ask another for a method that the merged one lacks.
    """
    model, kept = found.adapted, list[Change]()
    for name, group in itertools.groupby(found.sums, key=lambda change: change.name):
        changes = [*group]
        try:
            tried = apply(twin(found.adapted, blocks=lambda block: block), [*kept, *changes])
            without_arithmetic(tried, images, lambda network, some: network(some))
        except Exception as error:  # a network that lost a layer may raise anything
            found.left[name or type(model).__name__] = f"a sum of branches stays: {first_line(error)}"
            continue
        model, kept = tried, [*kept, *changes]
    found.sums = kept
    return model


def _sums_of(module: nn.Module, seen: Observed, name: str) -> tuple[list[str], dict[str, str]]:
    """Return the sums that a module computes, by place, and why others stay. Raises ValueError if it computes none."""
    if next(module.parameters(), None) is None:
        return [], {}
    graph = sums.trace(module)
    if seen.arguments[name] != sum(node.op == "placeholder" for node in graph.nodes):
        raise ValueError("it is called with keyword arguments, or with more arguments than it needs")
    merged, left = sums.find(module, graph)
    return list(dict.fromkeys(each.place for each in merged)), left


def _folds(model: nn.Module, found_in: _Seen, found: MergePlan) -> list[Change]:
    """Return the changes that fold a norm into the convolution that it, and nothing else, reads."""
    folds, seen = [], found_in.pass_
    for change in found_in.wanted:
        if change.norm is None:
            continue
        if seen.readers[change.name] > seen.calls[change.name]:
            found.left[change.norm] = "its input is also used elsewhere"
        elif seen.uses[change.name] or seen.uses[change.norm]:
            found.left[change.norm] = "its weights, or those of its convolution, are also used elsewhere"
        else:
            folds.append(change)
    folded = {change.norm for change in folds}
    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    for name, module in model.named_modules():
        if is_norm(module) and name not in folded and id(module) not in inside:
            found.left.setdefault(name, _why_left(name, found_in))
    return folds


def _why_left(name: str, seen: _Seen) -> str:
    if not seen.pass_.calls[name]:
        return "the forward pass does not reach it"
    if name in seen.why_not:
        return f"its convolution cannot absorb it: {seen.why_not[name]}"
    return "its input is not the output of a single convolution"
