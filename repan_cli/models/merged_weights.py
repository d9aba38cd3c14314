"""Load merged weights of multi-branch networks into networks that still have their branches.

A merged file has one convolution in the place of each block. The function is the same if one branch holds that
convolution, minus what the others always add, and the others are silent (gamma 0). Merged weights thus load into a
network that can be trained, merged and evaluated like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.blocks.branches import ScaledIdentity
from repan_cli.blocks.kernel import BatchNorm, exact
from repan_cli.checkpoint.card import Change
from repan_cli.models.changes import apply
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.system.copies import deep_copy

LAYERS = (("c", "bn"), ("conv", "bn"), ("l", "bn"))
"""timm's names of a convolution or linear layer and of the BN next to it, which merge into one layer."""


class MergedNames:
    """The names of a network's weights after its blocks are merged."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changes = [Change("adapt", name) for name, module in model.named_modules() if is_own_block(module)]
        self._places = self._twin(deep_copy(model)) if self._changes else {}

    def _twin(self, model: nn.Module) -> dict[str, RepBlock]:
        """Return the network with its blocks as `RepBlock`s, on the same tensors."""
        tensors = [*model.parameters(), *model.buffers()]
        twin = deep_copy(model, {id(tensor): tensor for tensor in tensors})
        with torch.random.fork_rng(devices=[]):
            apply(twin, self._changes)
        return dict(rep_blocks(twin))

    def are_in(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether weights have merged layers in the place of most blocks."""
        mixers = [place.rpartition(".")[0] for place in _mixers(self._model) if f"{place}.weight" in weights]
        held = {f"{name}.mixer.reparam_conv" for name in mixers}  # inside the one convolution of a whole mixer
        there = sum(name in held or f"{name}.weight" in weights for name in self._places)
        return bool(self._places) and 2 * there >= len(self._places)

    @torch.no_grad()
    def unmerged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a merged network under the names of one with branches, with the same function."""
        model = deep_copy(self._model)
        found = _with_mixers(model, dict(weights))
        touched: list[str] = []
        for name, block in self._twin(model).items():
            if _fits(found, name, block.trunk.conv):
                _hold(block, found.pop(f"{name}.weight"), found.pop(f"{name}.bias"))
                touched.append(
                    next(change.name for change in self._changes if f"{name}.".startswith(f"{change.name}."))
                )
        for name, module in model.named_modules():
            for conv, norm in _layers(module):
                if _fits(found, name, conv):
                    _fill(conv, norm, found.pop(f"{name}.weight"), found.pop(f"{name}.bias"))
                    touched.append(name)
        _heads(model, found, touched)
        starts = tuple(f"{name}." for name in touched)
        held = {name: value for name, value in model.state_dict().items() if name.startswith(starts)}
        return held | found  # layers besides the branches, such as attention, come from the file


def _fits(weights: Mapping[str, Tensor], name: str, layer: nn.Conv2d | nn.Linear) -> bool:
    """Return whether there is a merged layer under a name, with a shape that fits its target."""
    weight = weights.get(f"{name}.weight")
    return weight is not None and f"{name}.bias" in weights and weight.shape == layer.weight.shape


def _hold(block: RepBlock, weight: Tensor, bias: Tensor) -> None:
    """Make a block compute one convolution, by its trunk alone as far as the other branches can be silent."""
    for branch in block.sides:
        if not isinstance(branch, ScaledIdentity):  # which timm's block always adds
            branch.zero_init()
    if isinstance(block.post_norm, BatchNorm):
        _make_identity(block.post_norm, torch.zeros_like(bias))
    kernel, offset = block.without_branches((exact(weight), exact(bias)))
    _fill(block.trunk.conv, block.trunk.batch_norm, kernel, offset)


def _fill(layer: nn.Conv2d | nn.Linear, norm: BatchNorm | None, weight: Tensor, bias: Tensor) -> None:
    """Put a layer with a bias in the place of a layer and its BN, which comes before or after it."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
        bias = torch.zeros_like(bias)
    if norm is not None:
        _make_identity(norm, bias if isinstance(layer, nn.Conv2d) else bias.new_zeros(norm.num_features))


def _make_identity(norm: BatchNorm, bias: Tensor) -> None:
    """Make a BN add `bias` and do nothing else; its counter says that it is not fresh."""
    for tensor, value in ((norm.running_mean, 0.0), (norm.running_var, 1.0), (norm.num_batches_tracked, 1)):
        if tensor is not None:
            tensor.fill_(value)
    norm.weight.fill_((1 + norm.eps) ** 0.5)
    norm.bias.copy_(bias)


def _layers(module: nn.Module) -> list[tuple[nn.Conv2d | nn.Linear, BatchNorm]]:
    children = dict(module.named_children())
    pairs = [(children.get(conv), children.get(norm)) for conv, norm in LAYERS]
    return [(c, n) for c, n in pairs if isinstance(c, (nn.Conv2d, nn.Linear)) and isinstance(n, BatchNorm)]


def _heads(model: nn.Module, found: dict[str, Tensor], touched: list[str]) -> None:
    """Put one classifier in the place of two whose outputs are averaged, as in RepViT."""
    heads = dict(model.named_children()).get("head")
    if heads is None or "head.weight" not in found:
        return
    pairs = [(name, pair) for name, child in heads.named_children() for pair in _layers(child)]
    if len(pairs) == 2 and all(pair[0].weight.shape == found["head.weight"].shape for _, pair in pairs):
        weight, bias = found.pop("head.weight"), found.pop("head.bias")
        for name, (layer, norm) in pairs:
            _fill(layer, norm, weight, bias)
            touched.append(f"head.{name}")


# ---------------------------------------------------------------------------------------------- FastViT's token mixers


def _mixers(model: nn.Module) -> list[str]:
    """Return the places of merged token mixers: `x + scale * (mixer(x) - norm(x))` as one convolution."""
    found = [name for name, module in model.named_modules() if type(module).__name__ == "RepMixer"]
    return [f"{name}.reparam_conv" for name in found]


def _with_mixers(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which the mixer of each RepMixer holds the merged convolution minus the identity."""
    for place in _mixers(model):
        if f"{place}.weight" not in weights:
            continue
        name = place.rpartition(".")[0]
        weight, bias = weights.pop(f"{place}.weight"), weights.pop(f"{place}.bias")
        less = exact(weight)
        less[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] -= 1  # depthwise
        weights |= {f"{name}.mixer.reparam_conv.weight": less, f"{name}.mixer.reparam_conv.bias": bias}
        weights[f"{name}.layer_scale.gamma"] = torch.ones(len(bias), 1, 1, dtype=bias.dtype)
        norm = model.get_submodule(f"{name}.norm.identity")
        assert isinstance(norm, BatchNorm)
        _make_identity(norm, torch.zeros_like(bias))
        norm.weight.zero_()
        weights |= {f"{name}.norm.identity.{key}": value for key, value in norm.state_dict().items()}
    return weights
