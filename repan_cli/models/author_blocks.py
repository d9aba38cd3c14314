"""Load the blocks of ACNet and DBB, by their authors' names for the parts, in place of convolutions of any network.

A block replaces a convolution of the plain network, together with the BN behind it. If the network has a block of the
same family there, the weights go into it. Otherwise they are merged and go into the convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.blocks.kernel import BatchNorm, Kernel, averaged, compose, embed, exact, identity_kernel
from repan_cli.models.probe import noise, watch
from repan_cli.models.twins import without_arithmetic

Weights = Mapping[str, Tensor]

BLOCK = re.compile(r"^(?P<place>.+)\.(?P<part>square_conv|dbb_origin|fused_conv|dbb_reparam)\.")
MERGED = ("fused_conv", "dbb_reparam")
EPS = 1e-5
"""The eps of the authors' BN, which files do not store."""

OF_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SIZES = (64, 224)
"""Sides of images with which the BN behind convolutions are sought."""

ACB = {
    "square_conv.weight": "trunk.conv.weight",
    "square_bn.": "trunk.norm.",
    "hor_conv.weight": "branches.0.conv.weight",
    "hor_bn.": "branches.0.norm.",
    "ver_conv.weight": "branches.1.conv.weight",
    "ver_bn.": "branches.1.norm.",
}
DBB = {
    "dbb_origin.conv.weight": "trunk.conv.weight",
    "dbb_origin.bn.": "trunk.norm.",
    "dbb_1x1.conv.weight": "branches.0.conv.weight",
    "dbb_1x1.bn.": "branches.0.norm.",
    "dbb_1x1_kxk.idconv1.conv.weight": "branches.1.inner_conv.weight",
    "dbb_1x1_kxk.idconv1.weight": "branches.1.inner_conv.weight",
    "dbb_1x1_kxk.bn1.bn.": "branches.1.inner_norm.",
    "dbb_1x1_kxk.conv2.weight": "branches.1.conv.weight",
    "dbb_1x1_kxk.bn2.": "branches.1.norm.",
    "dbb_avg.conv.weight": "branches.2.inner_conv.weight",
    "dbb_avg.bn.bn.": "branches.2.inner_norm.",
    "dbb_avg.avgbn.": "branches.2.norm.",
}
PARTS = {"acb": ACB, "dbb": DBB}
"""The authors' names of parts, and the names in repan's blocks of each family."""


def blocks_in_place(weights: Weights, model: nn.Module) -> Weights:
    """Return weights in which each of the authors' blocks is in the place of the network's block or convolution of that
    name.

    Raises ValueError for weights without such blocks.
    """
    found = dict(weights)
    places = {match["place"]: match["part"] in MERGED for name in weights if (match := BLOCK.match(name))}
    if not places:
        raise ValueError("no blocks of ACNet or DBB")
    blocks = dict(rep_blocks(model))
    convs = {name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d) and name in places}
    norms = _norms_behind(model, convs) if convs else {}
    for place, is_merged in places.items():
        part = {name[len(place) + 1 :]: value for name, value in weights.items() if name.startswith(f"{place}.")}
        if place in blocks and not is_merged:
            new = _as_block(part, blocks[place])
        elif place in convs:
            norm = norms.get(place)
            eps = EPS if norm is None else cast("BatchNorm", model.get_submodule(norm)).eps
            new = _as_conv(part, convs[place], norm, weights, eps)
        else:
            continue
        found = {name: value for name, value in found.items() if not name.startswith(f"{place}.")} | new_names(
            place, new
        )
    return found


def new_names(place: str, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their full names. Names that begin with a colon are full already."""
    return {name[1:] if name.startswith(":") else f"{place}.{name}": value for name, value in new.items()}


def _as_block(part: Weights, block: RepBlock) -> dict[str, Tensor]:
    """Return the weights for repan's block of the same family, by its own names; None for another family."""
    names = PARTS.get(block.family, {})
    found: dict[str, Tensor] = {"attach_rate": torch.ones(())}
    for name, value in part.items():
        start = next((each for each in names if name == each or (each.endswith(".") and name.startswith(each))), None)
        if start is not None:
            found[names[start] + name[len(start) :]] = value
    norm, var = block.trunk.batch_norm, found.get("trunk.norm.running_var")
    if norm is not None and norm.eps != EPS and var is not None:  # the network's own BN, of another epsilon
        gamma = found["trunk.norm.weight"]
        found["trunk.norm.weight"] = (exact(gamma) * ((exact(var) + norm.eps) / (exact(var) + EPS)).sqrt()).to(gamma)
    if (inner := part.get("dbb_1x1_kxk.conv1.weight")) is not None and block.family == "dbb":
        own = dict(block.named_buffers())["branches.1.inner_conv.identity"]
        found["branches.1.inner_conv.weight"] = inner - own.to(inner)
    if block.family == "dbb" and "dbb_1x1.conv.weight" not in part:  # the authors' block has none if it is depthwise
        silent = block.branches[0].state_dict()
        zeros = {name: torch.zeros_like(silent[name]) for name in ("norm.weight", "norm.bias")}
        found |= {f"branches.0.{name}": value for name, value in {**silent, **zeros}.items()}
    return found


# ---------------------------------------------------------------------------------------------- as one convolution


def _as_conv(part: Weights, conv: nn.Conv2d, norm: str | None, weights: Weights, eps: float) -> dict[str, Tensor]:
    """Return the weights of one convolution, and of the BN behind it if the file lacks that, with the same function.

    `eps` is that of the network's BN.
    """
    kernel, bias = _kernel(part, conv)
    like = next(iter(part.values()))
    found = {"weight": kernel.to(like)}
    if conv.bias is not None:
        return {**found, "bias": bias.to(like)}
    if norm is None:
        return found if not bias.any() else {}
    if f"{norm}.running_mean" in weights:  # the network's own BN is there too
        return {**found, f":{norm}.running_mean": (exact(weights[f"{norm}.running_mean"]) - bias).to(like)}
    return {**found, **{f":{norm}.{name}": value for name, value in _identity(bias, like, eps).items()}}


def _identity(bias: Tensor, like: Tensor, eps: float) -> dict[str, Tensor]:
    ones = torch.ones_like(bias)
    state = {"weight": ones * (1 + eps) ** 0.5, "bias": bias, "running_mean": ones * 0, "running_var": ones}
    return {**{name: value.to(like) for name, value in state.items()}, "num_batches_tracked": torch.tensor(1)}


def _kernel(part: Weights, conv: nn.Conv2d) -> Kernel:
    """Return the kernel of the convolution that a block equals."""
    for name in MERGED:
        if f"{name}.weight" in part:
            weight = exact(part[f"{name}.weight"])
            bias = part.get(f"{name}.bias")
            return weight, exact(bias) if bias is not None else weight.new_zeros(len(weight))
    weights, biases = zip(*_branches(part, conv), strict=True)
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def _branches(part: Weights, conv: nn.Conv2d) -> Iterator[Kernel]:
    height, width = size = (conv.kernel_size[0], conv.kernel_size[1])
    middle = (height // 2, width // 2)
    if "square_conv.weight" in part:
        yield _normed(_bare(part["square_conv.weight"]), part, "square_bn")
        yield embed(_normed(_bare(part["ver_conv.weight"]), part, "ver_bn"), size, (0, middle[1]))
        yield embed(_normed(_bare(part["hor_conv.weight"]), part, "hor_bn"), size, (middle[0], 0))
        return
    yield _normed(_bare(part["dbb_origin.conv.weight"]), part, "dbb_origin.bn")
    if "dbb_1x1.conv.weight" in part:
        yield embed(_normed(_bare(part["dbb_1x1.conv.weight"]), part, "dbb_1x1.bn"), size, middle)
    if "dbb_avg.avgbn.running_var" in part:
        inner = identity_kernel(conv.in_channels, conv.groups)
        if "dbb_avg.conv.weight" in part:
            inner = _normed(_bare(part["dbb_avg.conv.weight"]), part, "dbb_avg.bn.bn")
        yield _normed(averaged(inner, size), part, "dbb_avg.avgbn")
    if "dbb_1x1_kxk.conv2.weight" in part:
        inner = _normed(_first(part, conv), part, "dbb_1x1_kxk.bn1.bn")
        both = compose(inner, _bare(part["dbb_1x1_kxk.conv2.weight"]), conv.groups)
        yield _normed(both, part, "dbb_1x1_kxk.bn2")


def _first(part: Weights, conv: nn.Conv2d) -> Kernel:
    """Return the 1x1 convolution before the large one; it may be stored minus the identity."""
    if "dbb_1x1_kxk.conv1.weight" in part:
        return _bare(part["dbb_1x1_kxk.conv1.weight"])
    names = ("dbb_1x1_kxk.idconv1.weight", "dbb_1x1_kxk.idconv1.conv.weight")
    weight = next(part[name] for name in names if name in part)
    identity, bias = identity_kernel(conv.in_channels, conv.groups)
    return exact(weight) + identity, bias


def _bare(weight: Tensor) -> Kernel:
    return exact(weight), torch.zeros(len(weight), dtype=torch.float64)


def _normed(kernel: Kernel, part: Weights, name: str) -> Kernel:
    """Return the kernel followed by the BN of this name."""
    gamma, beta, mean, var = (exact(part[f"{name}.{each}"]) for each in OF_NORM[:4])
    scale = gamma / torch.sqrt(var + EPS)
    return kernel[0] * scale.view(-1, 1, 1, 1), (kernel[1] - mean) * scale + beta


def _norms_behind(model: nn.Module, convs: Mapping[str, nn.Conv2d]) -> dict[str, str]:
    """Return the names of the BN that read convolutions, as seen in one forward pass."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for side in SIZES:
            try:
                return without_arithmetic(model, noise(1, first.in_channels, side, side), _pairs)
            except Exception:  # a network may raise anything for images of another size
                continue
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {}


def _pairs(model: nn.Module, images: Tensor) -> dict[str, str]:
    seen = watch(model, images, trains=False)
    names = {module: name for name, module in model.named_modules()}
    return {
        names[conv]: names[found[0]]
        for conv, found in seen.norms.items()
        if len(found) == 1 and isinstance(found[0], BatchNorm)
    }
