"""Convert timm's own multi-branch blocks to `RepBlock`s, keeping their trained weights.

Each adapter moves the branches of one timm module into a `RepBlock`. The block is in the place where timm puts its
merged convolution, so a fused network has timm's own deployed form, names included. Everything around the branches
(squeeze-excite, activation) stays timm's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from repan_cli.blocks import NATIVE, Branch, ConvBN, Geometry, IdentityBN, RepBlock, ScaledIdentity
from repan_cli.blocks.families import fitted
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.models.norms import split_norm

Adapter = Callable[[nn.Module], nn.Module]
_ADAPTERS: dict[tuple[str, str], Adapter] = {}


def _adapts(*classes: tuple[str, str]) -> Callable[[Adapter], Adapter]:
    def enter(adapter: Adapter) -> Adapter:
        _ADAPTERS.update(dict.fromkeys(classes, adapter))
        return adapter

    return enter


def is_own_block(module: nn.Module) -> bool:
    """Return whether a module is one of timm's multi-branch blocks, not yet merged, with branches to merge."""
    if _class_of(module) not in _ADAPTERS or getattr(module, "reparam_conv", None) is not None:
        return False
    holders = [getattr(module, name) for name in ("conv_kxk", "dw_conv_list", "fusion_bn") if hasattr(module, name)]
    return not any(holder is None or (isinstance(holder, nn.Sequential) and not len(holder)) for holder in holders)


def adapt(module: nn.Module) -> nn.Module:
    """Return the replacement of one of timm's blocks: the module with a `RepBlock` inside, or a `RepBlock`.

    Raises ValueError, with the reason, if it is not a sum of linear branches.
    """
    return _ADAPTERS[_class_of(module)](module)


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


# ---------------------------------------------------------------------------------------------- branches


def _conv_and_norm(layer: nn.Module) -> tuple[nn.Conv2d, BatchNorm | None]:
    """Return the parts of one of timm's conv + BN layers (`conv` or `c`, and `bn`), or of a lone convolution."""
    conv, norm = layer, None
    if not isinstance(layer, nn.Conv2d):
        conv = layer.get_submodule("conv" if hasattr(layer, "conv") else "c")
        norm, rest = split_norm(layer.get_submodule("bn"))
        if not isinstance(rest, nn.Identity) or not isinstance(_child(layer, "aa") or rest, nn.Identity):
            raise ValueError("one of its branches holds more than a convolution and a BN")
    if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d:
        raise ValueError(f"one of its branches is a {type(conv).__name__}")
    return conv, norm


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """Return the module under a name inside a module, if there is one."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _block(
    convs: list[nn.Module],
    identity: nn.Module | None = None,
    *,
    extra: Callable[[Geometry], Branch] | None = None,
    post_norm: BatchNorm | None = None,
) -> RepBlock:
    """Make a block of the layers `convs`, the first of which is the trunk, and an identity BN."""
    (conv, norm), *others = (_conv_and_norm(layer) for layer in convs)
    geometry = Geometry.of(conv)
    branches: list[Branch] = [
        ConvBN(side, side_norm, canvas=geometry.kernel_size, offset=geometry.offset_of(Geometry.of(side).padding))
        for side, side_norm in others
    ]
    kept: list[nn.Module | None] = [conv, norm, post_norm, *(part for pair in others for part in pair)]
    if identity is not None:
        own, _ = split_norm(identity)
        branches.append(IdentityBN(geometry, own))
        kept.append(own)
    if extra is not None:
        branches.append(extra(geometry))
    block = RepBlock(ConvBN(conv, norm, canvas=geometry.kernel_size), branches, family=NATIVE, post_norm=post_norm)
    return fitted(block, [layer for layer in kept if layer is not None])


@_adapts(
    ("timm.models.byobnet", "RepVggBlock"),
    ("timm.models.byobnet", "MobileOneBlock"),
    ("timm.models.fastvit", "MobileOneBlock"),
)
def _adapt_vgg_like(module: nn.Module) -> nn.Module:
    """k x k convolutions, one or several, a 1x1 and an identity BN: RepVGG, MobileOne, FastViT."""
    if not isinstance(_child(module, "drop_path") or nn.Identity(), nn.Identity):
        raise ValueError("it drops paths between its branches (drop_path)")
    main = module.get_submodule("conv_kxk")
    small = _child(module, "conv_1x1" if hasattr(module, "conv_1x1") else "conv_scale")
    convs = [*(main if isinstance(main, nn.ModuleList) else [main]), *([] if small is None else [small])]
    module.reparam_conv = _block(convs, _child(module, "identity"))
    return _without(module, "conv_kxk", "conv_1x1", "conv_scale", "identity", "drop_path")


@_adapts(("timm.models.fastvit", "ReparamLargeKernelConv"))
def _adapt_large_kernel(module: nn.Module) -> nn.Module:
    """A large and a small kernel."""
    small = _child(module, "small_conv")
    module.reparam_conv = _block([module.get_submodule("large_conv"), *([] if small is None else [small])])
    return _without(module, "large_conv", "small_conv")


@_adapts(("timm.models.lcnetv2", "RepDepthwiseSeparable"))
def _adapt_lcnet(module: nn.Module) -> nn.Module:
    """Depthwise kernels of falling size, before a pointwise convolution."""
    module.dw_conv = _block(list(module.get_submodule("dw_conv_list").children()))
    module.register_module("dw_conv_list", None)
    return module


@_adapts(("timm.models.repvit", "RepVggDw"))
def _adapt_repvit(module: nn.Module) -> nn.Module:
    """k x k + BN, 1x1 and the input itself, and in the newer form one BN after the sum."""
    norm = module.get_submodule("bn")
    post_norm = None if isinstance(norm, nn.Identity) else split_norm(norm)[0]
    convs = [module.get_submodule(name) for name in ("conv", "conv1")]
    return _block(convs, extra=ScaledIdentity, post_norm=post_norm)


@_adapts(("timm.models.repghost", "RepGhostModule"))
def _adapt_repghost(module: nn.Module) -> nn.Module:
    """The cheap operation: a depthwise k x k + BN and an identity BN."""
    layer = nn.Module()
    layer.conv, layer.bn = module.get_submodule("cheap_operation").children()
    module.cheap_operation = _block([layer], module.get_submodule("fusion_bn.0"))
    module.fusion_conv, module.fusion_bn = nn.Sequential(), nn.Sequential()
    return module


# ---------------------------------------------------------------------------------------------- sums of blocks

PLACE = "reparam_conv"
"""timm's name of the merged convolution."""

SUMS = {
    ("timm.models.fastvit", "RepMixer"): ("mixer", "norm", "layer_scale"),
    ("timm.models.fastvit", "RepConditionalPosEnc"): ("pos_enc",),
}
"""timm's modules that are a sum as a whole, with the parts that timm drops when it merges them."""


def has_place_for_merged(module: nn.Module) -> bool:
    """Return whether a module of timm's is one sum as a whole, and knows a merged form."""
    return _class_of(module) in SUMS


def with_merged(module: nn.Module, conv: nn.Module) -> nn.Module:
    """Return such a module in its merged form; the given one is unchanged."""
    merged = copy.copy(module)
    merged.__dict__["_modules"] = dict(module._modules)
    setattr(merged, PLACE, conv)
    return _without(merged, *SUMS[_class_of(module)])


def _without(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
    return module
