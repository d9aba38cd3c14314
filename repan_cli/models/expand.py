"""Any network's convolutions become blocks, without changing its function.

Which convolution belongs to which BN is seen by watching one forward pass, not guessed from names or order: a BN whose
input is exactly what a convolution returned. A float64 copy of the network, its BN statistics disturbed so that no
mistake hides behind fresh ones, tries the changes; those that move its output are taken back, one by one.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repan_cli.blocks import OWN, Geometry, RepBlock, block_around, check_family, refresh, rep_blocks
from repan_cli.errors import InputError
from repan_cli.models.adapt import adapt, check_norm, is_own_block, split_norm
from repan_cli.registry import did_you_mean

TOLERANCE = 1e-10
"""Bound on the relative change of the network's output in float64."""

NUDGE, CEILING = 1e-13, 1e-4
"""A network that amplifies rounding may differ by what this change of its images does to it, up to the ceiling."""

PROBE_IMAGES = 2
DEFAULT_FAMILY = "repvgg"
NOT_CHOSEN = "not chosen: "


class Change(NamedTuple):
    """One place of a network that becomes a block; in a checkpoint a list of texts.

    `adapt` makes blocks of timm's own multi-branch module `name`; `expand` one of the convolution `name` and the BN
    `norm`, if it has one (else it gets a bias, if it has none); `grow` gives the block `name`, which has no side
    branch, those of a family; `copies` is the number of branches, for the families that let choose.
    """

    kind: str
    name: str
    norm: str | None = None
    family: str | None = None
    copies: int | None = None


@dataclass(frozen=True)
class Selection:
    """Which convolutions become blocks, or which blocks restart.

    Args:
        kernel: sizes of the larger side of the kernel; empty is all above 1, None all.
        include: globs of names; empty is all.
        exclude: globs of names that are left out.
        limit: at most this many, those with the most weights first.
    """

    kernel: tuple[int, ...] | None = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = None

    def left_out(self, convs: Mapping[str, nn.Conv2d]) -> dict[str, str]:
        """Of convolutions by name those that are not chosen, with the reason."""
        reasons = {name: reason for name, conv in convs.items() if (reason := self._reason(name, conv))}
        chosen = sorted((name for name in convs if name not in reasons), key=lambda name: -convs[name].weight.numel())
        if self.limit is not None:
            reasons |= dict.fromkeys(chosen[self.limit :], f"{NOT_CHOSEN}beyond block.limit={self.limit}")
        return reasons

    def _reason(self, name: str, conv: nn.Conv2d) -> str | None:
        size = max(conv.kernel_size)
        if self.include and not _matches(name, self.include):
            return f"{NOT_CHOSEN}no name in block.include"
        if _matches(name, self.exclude):
            return f"{NOT_CHOSEN}a name in block.exclude"
        if self.kernel is None or size in self.kernel or (not self.kernel and size > 1):
            return None
        wanted = "[" + ",".join(map(str, self.kernel)) + "]" + ("" if self.kernel else ", all above 1")
        return f"{NOT_CHOSEN}kernel {'x'.join(map(str, conv.kernel_size))}, block.kernel is {wanted}"


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


EVERYTHING = Selection(kernel=None, include=("*",))


@dataclass(frozen=True)
class Expansion:
    """The blocks that a network is to have: the family, the changes, and why other convolutions are left alone."""

    family: str
    changes: tuple[Change, ...]
    left: Mapping[str, str]

    def after(self, earlier: Expansion | None) -> Expansion:
        """This one, made of a network that had an earlier one."""
        return dataclasses.replace(self, changes=(*earlier.changes, *self.changes)) if earlier else self

    def as_meta(self) -> dict[str, Any]:
        """In plain types, for a checkpoint."""
        return {"changes": [list(change) for change in self.changes], "left": dict(self.left)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Expansion:
        """From the description in a checkpoint."""
        structure = meta["structure"]
        return cls(meta["block"], tuple(Change(*parts) for parts in structure["changes"]), structure["left"])


def expand(
    model: nn.Module,
    block: str | None = None,
    *,
    images: Tensor,
    kernel: tuple[int, ...] = (),
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    limit: int | None = None,
    branches: int | None = None,
    attach: str = "ramp",
) -> nn.Module:
    """Make the convolutions of any network re-parameterizable, in place; its function in eval mode is unchanged.

    Trained weights, BN statistics, eps and momentum are kept. What was done is in `model.repan_report`: the family,
    the `changes`, and in `left` why other convolutions are left alone.

    Args:
        block: block family; None takes the network's own multi-branch blocks where it has them, elsewhere repvgg.
        images: a batch (N, C, H, W) that the network runs on; noise will do.
        kernel, include, exclude, limit: which convolutions, see `Selection`.
        branches: number of k x k side branches, for the families that let choose.
        attach: `ramp` begins at attach rate 0, to be raised by `set_attach_rate`; `zero-gamma` at rate 1 with silent
            branches; `one` at rate 1, which changes the function: for networks that are not trained.

    Raises InputError when no convolution can become a block.
    """
    selection = Selection(kernel, include, exclude, limit)
    expansion = plan(model, images, family=block, selection=selection, copies=branches)
    if not expansion.changes and not any(rep_blocks(model)):
        raise InputError(f"no convolution of the network can become a block: {summary(expansion.left)}")
    apply(model, expansion.changes, attach=attach)
    model.repan_report = expansion.after(getattr(model, "repan_report", None))
    return model


def summary(left: Mapping[str, str]) -> str:
    """The reasons for which convolutions are left alone, the most frequent first, each with a name."""
    if not left:
        return "it has none"
    first = {reason: name for name, reason in reversed(left.items())}
    counted = Counter(left.values()).most_common(3)
    return "; ".join(f"{first[reason]}{f' and {n - 1} more' if n > 1 else ''}: {reason}" for reason, n in counted)


# ---------------------------------------------------------------------------------------------- carrying out


def apply(model: nn.Module, changes: Iterable[Change], *, attach: str = "ramp") -> None:
    """Make the changes in a network, in place. Fresh branches draw from the global generator."""
    for change in changes:
        module = model.get_submodule(change.name)
        if change.kind == "adapt":
            _put(model, change.name, adapt(module))
            continue
        block = _grown(module, change) if change.kind == "grow" else _expanded(model, module, change)
        _put(model, change.name, block)
        zero_start = block.trunk.has_norm and not block.trunk.norm.weight.any()
        refresh(block, "zero-gamma" if attach == "one" and zero_start else attach)


def _grown(block: RepBlock, change: Change) -> RepBlock:
    norm = block.trunk.norm if block.trunk.has_norm else None
    return block_around(block.trunk.conv, norm, change.family, copies=change.copies)


def _expanded(model: nn.Module, conv: nn.Module, change: Change) -> RepBlock:
    norm = None
    if change.norm is not None:
        norm, rest = split_norm(model.get_submodule(change.norm))
        _put(model, change.norm, rest.train(norm.training))
    elif conv.bias is None:  # the branches' BN will want one when they are merged
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
    return block_around(conv, norm, change.family, copies=change.copies)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---------------------------------------------------------------------------------------------- planning


@torch.no_grad()
def plan(
    model: nn.Module, images: Tensor, *, family: str | None, selection: Selection, copies: int | None = None
) -> Expansion:
    """What is to become a block; the model is left as it is. `copies` is the number of branches to choose.

    Raises InputError for a family that does not exist, a network that does not run on the images, a name in `include`
    that cannot become a block.
    """
    probe = _Probe(model, images)
    own, left = _own_blocks(probe)
    if family is None:
        family = OWN if own or any(rep_blocks(model)) else DEFAULT_FAMILY
    if family != OWN:
        check_family(family, copies)
    changes = [*own]
    if family == OWN:
        left |= _others(probe.changed(own))
    else:
        grown = [change._replace(copies=copies) for change in _to_grow(probe.model, family, selection)]
        changes += probe.keep(grown, after=changes, left=left)
        wanted, unsuited = to_expand(probe.changed(changes), probe.images, family, selection)
        left |= unsuited
        changes += probe.keep([change._replace(copies=copies) for change in wanted], after=changes, left=left)
    _check_included(model, selection, changes, left)
    return Expansion(family, tuple(changes), left)


def _own_blocks(probe: _Probe) -> tuple[list[Change], dict[str, str]]:
    left: dict[str, str] = {}
    found = [Change("adapt", name) for name, module in probe.model.named_modules() if is_own_block(module)]
    return probe.keep(found, after=[], left=left), left


def _others(model: nn.Module) -> dict[str, str]:
    reason = f"{NOT_CHOSEN}the network has blocks of its own; name a block family for the others, too"
    return dict.fromkeys(_free_convs(model), reason)


def _free_convs(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions outside of blocks, by name."""
    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and id(module) not in inside
    }


def _to_grow(model: nn.Module, family: str, selection: Selection) -> Iterator[Change]:
    bare = {name: block.trunk.conv for name, block in rep_blocks(model) if not block.branches}
    left = selection.left_out(bare)
    if family != "plain":
        yield from (Change("grow", name, None, family) for name in bare if name not in left)


def to_expand(
    model: nn.Module, images: Tensor, family: str, selection: Selection
) -> tuple[list[Change], dict[str, str]]:
    """The convolutions outside of blocks that suit a family, and why the others do not."""
    seen = watch(model, images)
    convs = _free_convs(model)
    left = {name: reason for name, conv in convs.items() if (reason := _unsuited(conv, seen))}
    kept_plain = dict.fromkeys(getattr(model, "plain_convs", ()), f"{NOT_CHOSEN}plain by the network's definition")
    left |= {name: reason for name, reason in kept_plain.items() if name in convs and not selection.include}
    left |= selection.left_out({name: conv for name, conv in convs.items() if name not in left})
    norms = {id(module): name for name, module in model.named_modules()}
    changes = [
        Change("expand", name, next((norms[id(norm)] for norm in seen.norms[conv]), None), family)
        for name, conv in convs.items()
        if name not in left
    ]
    return changes, left


def _unsuited(conv: nn.Module, seen: Sightings) -> str | None:
    """Why a convolution cannot become a block, whatever is selected."""
    norms = seen.norms[conv]
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, not a plain Conv2d"
    if conv._forward_pre_hooks or conv._forward_hooks or "forward" in vars(conv):
        return "it has hooks, such as those of weight norm, or a forward of its own"
    if seen.calls[conv] != 1:
        return f"it is called {seen.calls[conv]} times" if seen.calls[conv] else "the forward pass does not reach it"
    if seen.owners[id(conv.weight)] > 1:
        return "it shares its weight with another layer"
    if len(norms) > 1 or any(seen.calls[norm] > 1 for norm in norms):
        return "its BN is not its alone"
    try:
        Geometry.of(conv)
        for norm in norms:
            check_norm(norm)
    except ValueError as error:
        return str(error)
    return None


def _check_included(model: nn.Module, selection: Selection, changes: list[Change], left: Mapping[str, str]) -> None:
    """A name that was asked for and cannot be had is an error, not a line in a report."""
    blocks = {name for name, _ in rep_blocks(model)} | {change.name for change in changes}
    known = [*blocks, *left]
    for key, globs in (("include", selection.include), ("exclude", selection.exclude)):
        for glob in globs:
            if known and not any(fnmatch.fnmatchcase(name, glob) for name in known):
                raise InputError(f"block.{key}: no convolution is named '{glob}'{did_you_mean(glob, known)}")
    for glob in selection.include:
        if glob in left and not left[glob].startswith(NOT_CHOSEN):
            raise InputError(f"block.include: {glob} cannot become a block: {left[glob]}")


# ---------------------------------------------------------------------------------------------- watching


class Sightings(NamedTuple):
    """What one forward pass showed: how often a module was called, the BNs that read exactly a convolution's output,
    and how many layers own a parameter.
    """

    calls: Counter[nn.Module]
    norms: Mapping[nn.Module, list[nn.Module]]
    owners: Counter[int]


@torch.no_grad()
def watch(model: nn.Module, images: Tensor) -> Sightings:
    """Look at one forward pass of a network; on the meta device it costs no arithmetic."""
    calls: Counter[nn.Module] = Counter()
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]
    norms: dict[nn.Module, list[nn.Module]] = {conv: [] for conv in convs}

    def after_conv(conv: nn.Module, inputs: Any, output: Tensor) -> None:
        calls[conv] += 1
        if isinstance(output, Tensor):
            output._repan_source = conv, output._version  # an in-place change raises the version

    def before_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[norm] += 1
        conv, version = getattr(inputs[0], "_repan_source", (None, None)) if inputs else (None, None)
        if conv is not None and inputs[0]._version == version and norm not in norms[conv]:
            norms[conv].append(norm)

    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    free_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in inside]
    hooks = [conv.register_forward_hook(after_conv) for conv in convs]
    hooks += [norm.register_forward_pre_hook(before_norm) for norm in free_norms]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return Sightings(calls, norms, owners)


# ---------------------------------------------------------------------------------------------- trying


class _Probe:
    """A float64 copy of a network on the CPU in eval mode, with what it returns, to try changes on."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model = _copied(model).cpu().double().eval()
        self.images = images[:PROBE_IMAGES].detach().cpu().double()
        try:
            _disturb(self.model, self.images)
            self.expected = _tensors(self.model(self.images))
            again = _tensors(self.model(self.images))
            elsewhere = _tensors(self.model(torch.zeros_like(self.images)))
            nudged = _tensors(self.model(self.images * (1 + NUDGE)))
        except Exception as error:
            shape = "x".join(map(str, self.images.shape))
            raise InputError(
                f"the network does not run on images of shape {shape} in float64: {_line(error)}"
            ) from error
        self.bound = min(max(TOLERANCE, _difference(nudged, self.expected)), CEILING)
        if not all(tensor.isfinite().all() for tensor in self.expected):
            raise InputError("the network's output is not finite, so nothing can be compared")
        if _difference(again, self.expected) > TOLERANCE:
            raise InputError(
                "the network gives two outputs for the same images in eval mode, so nothing can be compared"
            )
        if not _difference(elsewhere, self.expected) > TOLERANCE:
            raise InputError("the network's output does not depend on its images, so nothing can be compared")

    def changed(self, changes: Iterable[Change]) -> nn.Module:
        """A copy with changes made. Leaves the global generator as it was."""
        model = copy.deepcopy(self.model)
        with torch.random.fork_rng(devices=[]):
            apply(model, changes)
        return model

    def keep(self, changes: list[Change], *, after: list[Change], left: dict[str, str]) -> list[Change]:
        """Those of `changes`, made after others, that keep the function; the reason of the rest goes into `left`."""
        kept = list(after)
        self._halve(changes, kept, left)
        return kept[len(after) :]

    def _halve(self, changes: list[Change], kept: list[Change], left: dict[str, str]) -> None:
        """Add to `kept` all of `changes` when they agree together, else one half after the other."""
        if not changes:
            return
        problem = self._problem([*kept, *changes])
        if problem is None:
            kept += changes
        elif len(changes) == 1:
            left[changes[0].name] = problem
        else:
            middle = len(changes) // 2
            self._halve(changes[:middle], kept, left)
            self._halve(changes[middle:], kept, left)

    def _problem(self, changes: list[Change]) -> str | None:
        try:
            model = self.changed(changes).eval()
        except ValueError as error:
            return str(error)
        try:
            found = _tensors(model(self.images))
        except Exception as error:  # whatever a network does with what was its convolution
            return f"as a block it fails: {_line(error)}"
        if not _difference(found, self.expected) <= self.bound:
            return "as a block it changes the network's function"
        return None


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        computed = [name for name, module in model.named_modules() if isinstance(vars(module).get("weight"), Tensor)]
        where = computed[0] if computed else "the network"
        raise InputError(
            f"{where} cannot be copied: its weight is computed, as by the older weight_norm; remove that "
            "(remove_weight_norm), or use torch.nn.utils.parametrizations"
        ) from error


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@torch.no_grad()
def _disturb(model: nn.Module, images: Tensor) -> None:
    """Give every BN random affine parameters and statistics near those of the images, and what is all zeros a value:
    then the images reach the output, and no mistake hides behind a fresh BN or a zero.
    """
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))

    def disturb(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = norm.running_mean.shape
        values = inputs[0].transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(values, dim=1, correction=0)
        norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn(shape, generator=draw))
        norm.running_var.copy_(torch.where(var > 0, var, 1.0) * (0.5 + torch.rand(shape, generator=draw)))
        if norm.weight is not None:
            norm.weight.copy_(0.5 + torch.rand(shape, generator=draw))
            norm.bias.copy_(0.1 * torch.randn(shape, generator=draw))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(disturb) for norm in norms]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in what a network returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference; infinite where the shapes differ."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    tiny = torch.finfo(torch.float64).tiny
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp_min(tiny)).item() for a, b in zip(found, expected, strict=True)
    ]
    return max(errors, default=0.0) if not any(error != error for error in errors) else float("inf")
