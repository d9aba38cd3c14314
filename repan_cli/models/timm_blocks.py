"""timm's own multi-branch blocks as `RepBlock`s, keeping their trained weights.

Each adapter moves the branches of one timm module into a `RepBlock` that stands where timm puts its merged
convolution, so that a fused network has timm's own deployed form, names included. What surrounds the branches
(squeeze-excite, activation) stays timm's.
"""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import BatchNormAct2d
from torch import nn

from repan_cli.blocks import NATIVE, Branch, ConvBN, Geometry, IdentityBN, RepBlock, ScaledIdentity

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
"""The BN types that are understood; a subclass may compute something else."""

Adapter = Callable[[nn.Module], nn.Module]
_ADAPTERS: dict[tuple[str, str], Adapter] = {}


def _adapts(*classes: tuple[str, str]) -> Callable[[Adapter], Adapter]:
    def enter(adapter: Adapter) -> Adapter:
        _ADAPTERS.update(dict.fromkeys(classes, adapter))
        return adapter

    return enter


def is_own_block(module: nn.Module) -> bool:
    """Whether a module is one of timm's multi-branch blocks, not yet merged, with branches to merge."""
    if _class_of(module) not in _ADAPTERS or getattr(module, "reparam_conv", None) is not None:
        return False
    holders = [getattr(module, name) for name in ("conv_kxk", "dw_conv_list", "fusion_bn") if hasattr(module, name)]
    return not any(holder is None or (isinstance(holder, nn.Sequential) and not len(holder)) for holder in holders)


def adapt(module: nn.Module) -> nn.Module:
    """What takes the place of one of timm's blocks: the module itself with a `RepBlock` inside, or a `RepBlock`.

    Raises ValueError, saying why, where it is no sum of linear branches.
    """
    return _ADAPTERS[_class_of(module)](module)


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def check_norm(norm: nn.Module) -> None:
    """Raises ValueError for a BN that cannot be folded."""
    if type(norm) not in NORMS or "forward" in vars(norm):
        raise ValueError(f"its norm is a {type(norm).__name__}, whose forward is its own")
    if norm.running_mean is None:
        raise ValueError("its BN keeps no running statistics (track_running_stats=False)")


def split_norm(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A BN by itself, on the same parameters and statistics, always affine; and the activation that it carried.

    Raises ValueError for a BN that cannot be folded.
    """
    check_norm(norm)
    if norm.weight is None:
        norm.weight = nn.Parameter(norm.running_var.new_ones(norm.num_features))
        norm.bias = nn.Parameter(norm.running_var.new_zeros(norm.num_features))
        norm.affine = True
    if not isinstance(norm, BatchNormAct2d):
        return norm, nn.Identity()
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    plain.weight, plain.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(plain, name, buffer)
    rest = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
    return plain.train(norm.training), rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


# ---------------------------------------------------------------------------------------------- branches


def _conv_and_norm(layer: nn.Module) -> tuple[nn.Conv2d, nn.Module | None]:
    """The parts of one of timm's conv + BN layers (`conv` and `bn`, or `c` and `bn`), or of a lone convolution."""
    if isinstance(layer, nn.Conv2d):
        conv, norm = layer, None
    else:
        conv = layer.conv if hasattr(layer, "conv") else layer.c
        norm, rest = split_norm(layer.bn)
        if not isinstance(rest, nn.Identity) or not isinstance(getattr(layer, "aa", None) or rest, nn.Identity):
            raise ValueError("one of its branches holds more than a convolution and a BN")
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"one of its branches is a {type(conv).__name__}")
    return conv, norm


def _block(
    convs: list[nn.Module],
    identity: nn.BatchNorm2d | None = None,
    *,
    extra: Callable[[Geometry], Branch] | None = None,
    post_norm: nn.BatchNorm2d | None = None,
) -> RepBlock:
    """A block of the layers `convs`, the first of which is the trunk, and an identity BN."""
    (conv, norm), *others = (_conv_and_norm(layer) for layer in convs)
    geometry = Geometry.of(conv)
    branches: list[Branch] = [
        ConvBN(side, side_norm, canvas=geometry.kernel_size, offset=geometry.offset_of(side.padding))
        for side, side_norm in others
    ]
    if identity is not None:
        branches.append(IdentityBN(geometry, split_norm(identity)[0]))
    if extra is not None:
        branches.append(extra(geometry))
    block = RepBlock(ConvBN(conv, norm, canvas=geometry.kernel_size), branches, family=NATIVE, post_norm=post_norm)
    return block.to(conv.weight.device, conv.weight.dtype).train(conv.training)


@_adapts(
    ("timm.models.byobnet", "RepVggBlock"),
    ("timm.models.byobnet", "MobileOneBlock"),
    ("timm.models.fastvit", "MobileOneBlock"),
)
def _adapt_vgg_like(module: nn.Module) -> nn.Module:
    """k x k convolutions, one or several, a 1x1 and an identity BN: RepVGG, MobileOne, FastViT."""
    if not isinstance(getattr(module, "drop_path", None) or nn.Identity(), nn.Identity):
        raise ValueError("it drops paths between its branches (drop_path)")
    main = module.conv_kxk
    small = module.conv_1x1 if hasattr(module, "conv_1x1") else module.conv_scale
    convs = [*(main if isinstance(main, nn.ModuleList) else [main]), small]
    convs = [layer for layer in convs if layer is not None]
    module.reparam_conv = _block(convs, module.identity)
    return _without(module, "conv_kxk", "conv_1x1", "conv_scale", "identity", "drop_path")


@_adapts(("timm.models.fastvit", "ReparamLargeKernelConv"))
def _adapt_large_kernel(module: nn.Module) -> nn.Module:
    """A large and a small kernel."""
    small = [module.small_conv] if getattr(module, "small_conv", None) is not None else []
    module.reparam_conv = _block([module.large_conv, *small])
    return _without(module, "large_conv", "small_conv")


@_adapts(("timm.models.lcnetv2", "RepDepthwiseSeparable"))
def _adapt_lcnet(module: nn.Module) -> nn.Module:
    """Depthwise kernels of falling size, before a pointwise convolution."""
    module.dw_conv = _block(list(module.dw_conv_list))
    module.dw_conv_list = None
    return module


@_adapts(("timm.models.repvit", "RepVggDw"))
def _adapt_repvit(module: nn.Module) -> nn.Module:
    """k x k + BN, 1x1 and the input itself, and in the newer form one BN after the sum."""
    post_norm = None if isinstance(module.bn, nn.Identity) else split_norm(module.bn)[0]
    return _block([module.conv, module.conv1], extra=ScaledIdentity, post_norm=post_norm)


@_adapts(("timm.models.repghost", "RepGhostModule"))
def _adapt_repghost(module: nn.Module) -> nn.Module:
    """The cheap operation: a depthwise k x k + BN and an identity BN."""
    conv, norm = module.cheap_operation
    layer = nn.Module()
    layer.conv, layer.bn = conv, norm
    module.cheap_operation = _block([layer], module.fusion_bn[0])
    module.fusion_conv, module.fusion_bn = nn.Sequential(), nn.Sequential()
    return module


def _without(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
    return module
