"""ResNets for small images, registered with timm: plain networks, whose convolutions `expand` turns into blocks.

`resnet18_cifar` to `resnet101_cifar` are timm's networks with another stem: a plain 3x3 convolution with stride 1, and
no pooling. `resnet110_cifar` is the narrow 6n+2 network of the paper (He et al. 2016, section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from repan_cli.models.small_net import SmallNet, small_cfg


class ResNetCifar(ResNet):
    """timm's ResNet for images of about 32 pixels; its last map has an eighth of their side."""

    plain_convs = ("conv1",)

    def __init__(self, *, in_chans: int = 3, zero_init_last: bool = False, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, zero_init_last=zero_init_last, **kwargs)
        stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.register_module("conv1", stem)  # in timm's types both are sequences
        self.register_module("maxpool", nn.Identity())
        for stage, info in enumerate(self.feature_info):
            info["reduction"] = 2 ** max(0, stage - 1)


class PaddedShortcut(nn.Module):
    """A shortcut without parameters: every second pixel, and zeros for the new channels (option A)."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class ResNet6n2(SmallNet):
    """A ResNet of 6n+2 layers: three stages of n basic blocks with 16, 32 and 64 channels."""

    plain_convs = ("stages.0.0",)

    def __init__(
        self,
        n: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        stages = [_stage(n, before, width) for before, width in ((16, 16), (16, 32), (32, 64))]
        self.stages = nn.Sequential(stem, *stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.finish(64, num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)


def _stage(n: int, before: int, width: int) -> nn.Sequential:
    stride = width // before
    shortcut = PaddedShortcut(stride, width - before) if stride > 1 else None
    first = BasicBlock(before, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(n - 1)))


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18_cifar": (BasicBlock, (2, 2, 2, 2)),
    "resnet34_cifar": (BasicBlock, (3, 4, 6, 3)),
    "resnet50_cifar": (Bottleneck, (3, 4, 6, 3)),
    "resnet101_cifar": (Bottleneck, (3, 4, 23, 3)),
}

default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.untrained": small_cfg(first_conv="conv1", classifier="fc", pool_size=4) for name in DEPTHS},
        "resnet110_cifar.untrained": small_cfg(first_conv="stages.0.0", classifier="head", pool_size=8),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ResNetCifar:
    block, layers = DEPTHS[variant]
    return build_model_with_cfg(ResNetCifar, variant, pretrained, block=block, layers=layers, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-18 for CIFAR: 11.2 M parameters."""
    return _create("resnet18_cifar", pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-34 for CIFAR: 21.3 M parameters."""
    return _create("resnet34_cifar", pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-50 for CIFAR, bottleneck blocks: 23.7 M parameters."""
    return _create("resnet50_cifar", pretrained, **kwargs)


@register_model
def resnet101_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-101 for CIFAR, bottleneck blocks: 42.7 M parameters."""
    return _create("resnet101_cifar", pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet6n2:
    """ResNet-110 of 6n+2 layers, 16 to 64 channels, shortcuts without parameters: 1.7 M parameters."""
    return build_model_with_cfg(ResNet6n2, "resnet110_cifar", pretrained, n=18, **kwargs)
