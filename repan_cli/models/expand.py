"""Convert the convolutions of any network into blocks, without changing its function.

The BN of a convolution is found by watching one forward pass, not guessed from names or order: it is the BN whose input
is exactly what the convolution returned. The changes are tried on a float64 copy of the network. Its BN statistics are
randomized, so that no mistake hides behind fresh ones. Changes that alter the output are undone, one by one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from repan_cli.blocks import NATIVE, Geometry, check_family, rep_blocks, use_block
from repan_cli.checkpoint.card import Change
from repan_cli.errors import InputError
from repan_cli.models.changes import Expansion, NotChosen, Selection, apply, report_of, set_report, summary
from repan_cli.models.norms import check_norm
from repan_cli.models.probe import Probe, Sightings, watch
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.registry import did_you_mean
from repan_cli.system.copies import unwrapped
from repan_cli.system.images import ImagesLike, first_batch

DEFAULT_FAMILY = "repvgg"
ATTACH = ("ramp", "zero-gamma", "one")


def expand(
    model: nn.Module,
    block: str | None = None,
    *,
    images: ImagesLike,
    kernel: int | Iterable[int] = (),
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    limit: int | None = None,
    branches: int | None = None,
    attach: str = "zero-gamma",
) -> nn.Module:
    """Make the convolutions of any network re-parameterizable, in place; its function in eval mode is unchanged.

    Trained weights, BN statistics, eps and momentum are kept. `model.repan_report` records the conversion: the family,
    the `changes`, and in `left` why other convolutions stay as they are.

    Args:
        model: the network, changed in place. Inside torch.compile or a data-parallel wrapper, the network itself gets
            the blocks and the report.
        block: the block family: a built-in or registered name, or `file.py:function`. None means the network's own
            multi-branch blocks if it has any, else repvgg.
        images: images (N, C, H, W) for a forward pass, which may be noise; or a batch, or a loader.
        kernel: the size or sizes of the kernels that become blocks; none means every size above 1x1.
        include: a glob or globs of the layers that become blocks; none means all.
        exclude: a glob or globs of the layers that stay as they are.
        limit: the largest number of blocks; layers with the most weights come first.
        branches: the number of k x k side branches, for families that allow a choice.
        attach: how the branches start. `ramp` sets attach rate 0, which `set_attach_rate` raises; at rate 0 they do not
            train. `zero-gamma` sets rate 1 with silent branches, which train at once. `one` sets rate 1 and changes the
            function: it is for untrained networks.

    Raises InputError if no convolution can become a block.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expand works in place, on a network, not on {model!r}: load it first, by repan_cli.load")
    if attach not in ATTACH:
        raise InputError(f"attach={attach!r} is not a choice{did_you_mean(str(attach), ATTACH)}: {', '.join(ATTACH)}")
    network = unwrapped(model)
    kernels = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    chosen, left_out = ((globs,) if isinstance(globs, str) else tuple(globs) for globs in (include, exclude))
    selection = Selection(kernels, chosen, left_out, limit)
    expansion = plan(network, first_batch(images), family=use_block(block), selection=selection, copies=branches)
    if not expansion.changes and not any(rep_blocks(network)):
        raise InputError(f"no convolution of the network can become a block: {summary(expansion.left)}")
    apply(network, expansion.changes, attach=attach)
    report = expansion.after(report_of(network))
    for each in (network, model):
        set_report(each, report)
    return model


# ---------------------------------------------------------------------------------------------- planning


@torch.no_grad()
def plan(
    model: nn.Module, images: Tensor, *, family: str | None, selection: Selection, copies: int | None = None
) -> Expansion:
    """Plan which convolutions become blocks, without changing the model. `copies` is the number of branches to choose.

    Raises InputError for an unknown family, a network that does not run on the images, or a name in `include` that
    cannot become a block.
    """
    probe = Probe(model, images)
    own, left = _own_blocks(probe)
    if family is None:
        family = NATIVE if own or any(rep_blocks(model)) else DEFAULT_FAMILY
    if family != NATIVE:
        check_family(family, copies)
    changes = [*own]
    if family == NATIVE:
        left |= _others(probe.changed(own))
    else:
        grown = [change._replace(copies=copies) for change in _to_grow(probe.model, family, selection)]
        changes += probe.keep(grown, after=changes, left=left)
        changed = probe.changed(changes)
        wanted, unsuited = to_expand(changed, watch(changed, probe.images), family, selection)
        left |= unsuited
        changes += probe.keep([change._replace(copies=copies) for change in wanted], after=changes, left=left)
    _check_included(model, selection, changes, left)
    return Expansion(family, tuple(changes), left)


def _own_blocks(probe: Probe) -> tuple[list[Change], dict[str, str]]:
    left: dict[str, str] = {}
    found = [Change("adapt", name) for name, module in probe.model.named_modules() if is_own_block(module)]
    return probe.keep(found, after=[], left=left), left


def _others(model: nn.Module) -> dict[str, str]:
    reason = NotChosen("the network has blocks of its own; name a block family for the others, too")
    return dict.fromkeys(_free_convs(model), reason)


def _free_convs(model: nn.Module) -> dict[str, _ConvNd]:
    """Return the convolutions outside of blocks, by name."""
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
    model: nn.Module, seen: Sightings, family: str, selection: Selection, *, trains: bool = True
) -> tuple[list[Change], dict[str, str]]:
    """Return the convolutions outside of blocks that suit a family, and the reason for each of the others.

    A block that `trains` is called once in a pass, is a plain convolution, and its BN has no hooks. To merge, any type
    of convolution is tried, such as one that pads as TensorFlow does; the proof shows whether it may absorb a BN.
    """
    convs = _free_convs(model)
    left = {name: reason for name, conv in convs.items() if (reason := _unsuited(conv, seen, family, trains=trains))}
    kept_plain = dict.fromkeys(getattr(model, "plain_convs", ()), NotChosen("plain by the network's definition"))
    left |= {name: reason for name, reason in kept_plain.items() if name in convs and not selection.include}
    suited = {name: conv for name, conv in convs.items() if isinstance(conv, nn.Conv2d) and name not in left}
    left |= selection.left_out(suited)
    norms = {id(module): name for name, module in model.named_modules()}
    changes = [
        Change("expand", name, next((norms[id(norm)] for norm in seen.norms[conv]), None), family)
        for name, conv in convs.items()
        if name not in left
    ]
    return changes, left


def _unsuited(conv: _ConvNd, seen: Sightings, family: str, *, trains: bool) -> str | None:
    """Return why a convolution cannot become a block, whatever the selection."""
    norms, calls = seen.norms[conv], seen.calls[conv]
    if type(conv) is not nn.Conv2d and (trains or not isinstance(conv, nn.Conv2d) or is_parametrized(conv)):
        return f"it is a {type(conv).__name__}, not a plain Conv2d"
    if conv._forward_pre_hooks or conv._forward_hooks or "forward" in vars(conv):
        return "it has hooks, such as those of weight norm, or a forward of its own"
    if not calls or (calls > 1 and trains):
        return f"it is called {calls} times" if calls else "the forward pass does not reach it"
    if seen.owners[id(conv.weight)] > 1:
        return "it shares its weight with another layer"
    if len(norms) > 1 or any(seen.calls[norm] != calls for norm in norms):
        return "its BN is shared"
    if trains and any(norm._forward_pre_hooks or norm._forward_hooks for norm in norms):
        return "its BN has hooks"
    try:
        if family != "plain":
            Geometry.of(conv)
        for norm in norms:
            check_norm(norm)
    except ValueError as error:
        return str(error)
    return None


def _check_included(model: nn.Module, selection: Selection, changes: list[Change], left: Mapping[str, str]) -> None:
    """Raise InputError for a layer that was named but cannot become a block: a line in a report would be too little."""
    blocks = {name for name, _ in rep_blocks(model)} | {change.name for change in changes}
    known = [*blocks, *left]
    for key, globs in (("include", selection.include), ("exclude", selection.exclude)):
        for glob in globs:
            if known and not any(fnmatch.fnmatchcase(name, glob) for name in known):
                raise InputError(f"block.{key}: no convolution is named '{glob}'{did_you_mean(glob, known)}")
    for glob in selection.include:
        if glob in left and not isinstance(left[glob], NotChosen):
            raise InputError(f"block.include: {glob} cannot become a block: {left[glob]}")
