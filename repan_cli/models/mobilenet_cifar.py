"""MobileNetV1 for small images, registered with timm: depthwise and pointwise convolutions in turn."""

from __future__ import annotations

from typing import Any

from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from repan_cli.models.small_net import SmallNet, small_cfg

LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels and stride of each pair of convolutions (Howard et al. 2017, table 1, behind a stem of stride 1)."""


class MobileNetV1Cifar(SmallNet):
    """MobileNetV1 for images of about 32 pixels; its last map has a sixteenth of their side."""

    plain_convs = ("stages.0.conv",)

    def __init__(
        self,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormAct(in_chans, 32, 3)]
        channels = 32
        for width, stride in LAYERS:
            depthwise = ConvNormAct(channels, channels, 3, stride=stride, groups=channels)
            layers.append(nn.Sequential(depthwise, ConvNormAct(channels, width, 1)))
            channels = width
        self.stages = nn.Sequential(*layers)
        self.finish(channels, num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)


default_cfgs = generate_default_cfgs(
    {"mobilenetv1_cifar.untrained": small_cfg(first_conv="stages.0.conv", classifier="head", pool_size=2)}
)


@register_model
def mobilenetv1_cifar(pretrained: bool = False, **kwargs: Any) -> MobileNetV1Cifar:
    """MobileNetV1 for CIFAR: 3.3 M parameters."""
    return build_model_with_cfg(MobileNetV1Cifar, "mobilenetv1_cifar", pretrained, **kwargs)
