"""Plan a merge beyond existing blocks: timm's own blocks, sums of branches, and BN layers after convolutions.

Planning watches forward passes on the meta device, which cost no arithmetic. The proof in float64 follows when the plan
is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    seen, wanted = without_arithmetic(found.adapted, one, _look)
    merged = _with_sums(found, seen)
    if found.sums:
        seen, wanted = without_arithmetic(merged, one, _look)
    found.folds = _folds(merged, wanted, seen, found)
    return found


def _look(model: nn.Module, images: Tensor) -> tuple[Observed, list[Change]]:
    """Observe one forward pass; also return the convolutions into which a BN may be folded."""
    seen, sightings = observe(model, images)
    return seen, to_expand(model, sightings, "plain", EVERYTHING)[0]


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


def _sums_of(module: nn.Module, seen: Observed, name: str) -> tuple[list[str], dict[str, str]]:
    """Return the sums that a module computes, by place, and why others stay. Raises ValueError if it computes none."""
    if next(module.parameters(), None) is None:
        return [], {}
    if seen.calls[name] != 1:
        raise ValueError(f"it is called {seen.calls[name]} times")
    graph = sums.trace(module)
    if seen.arguments[name] != sum(node.op == "placeholder" for node in graph.nodes):
        raise ValueError("it is called with keyword arguments, or with more arguments than it needs")
    merged, left = sums.find(module, graph)
    return list(dict.fromkeys(each.place for each in merged)), left


def _folds(model: nn.Module, wanted: list[Change], seen: Observed, found: MergePlan) -> list[Change]:
    """Return the changes that fold a norm into the convolution that it, and nothing else, reads."""
    folds = []
    for change in wanted:
        if change.norm is None:
            continue
        if seen.readers[change.name] > 1:
            found.left[change.norm] = "its input is also used elsewhere"
        elif seen.uses[change.name] or seen.uses[change.norm]:
            found.left[change.norm] = "its weights, or those of its convolution, are also used elsewhere"
        else:
            folds.append(change)
    folded = {change.norm for change in folds}
    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    for name, module in model.named_modules():
        if is_norm(module) and name not in folded and id(module) not in inside:
            found.left.setdefault(name, _why_left(name, seen))
    return folds


def _why_left(name: str, seen: Observed) -> str:
    if not seen.calls[name]:
        return "the forward pass does not reach it"
    return "its input is not the output of a single convolution"
