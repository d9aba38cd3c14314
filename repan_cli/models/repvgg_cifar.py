"""RepVGG for small images, registered with timm: the narrow networks for which RepAn's CIFAR results are stated.

Five stages of blocks with strides 1, 1, 2, 2, 1, then average pooling and a linear classifier. Deployed,
`repvgg_a1_cifar` has 0.64 M parameters for 100 classes, a twentieth of timm's `repvgg_a1`.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from repan_cli.blocks import Geometry, make_block
from repan_cli.models.small_net import SmallNet, small_cfg

STRIDES = (1, 1, 2, 2, 1)
BASE_WIDTHS = (16, 16, 32, 64, 64)
DEPTHS_A = (1, 2, 4, 14, 1)
DEPTHS_B = (1, 4, 6, 16, 1)


class RepVggCifar(SmallNet):
    """A RepVGG network for images of about 8 to 64 pixels.

    Args:
        depths: blocks per stage.
        width: factor on the widths of the first four stages (the first stage has at most 16 channels).
        last_width: factor on the width of the last stage.
        num_classes: outputs; 0 leaves the classifier out.
        in_chans: channels of the input.
        block: block family, see `repan_cli.blocks.FAMILIES`.
        branches: number of k x k side branches, for families that allow a choice.
        drop_rate: dropout before the classifier.
        global_pool: timm's name of the pooling.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        width: float,
        last_width: float,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        block: str = "repvgg",
        branches: int | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        factors = (width, width, width, width, last_width)
        widths = [int(base * factor) for base, factor in zip(BASE_WIDTHS, factors, strict=True)]
        widths[0] = min(BASE_WIDTHS[0], widths[0])
        stages, channels = [], in_chans
        for depth, out_channels, stride in zip(depths, widths, STRIDES, strict=True):
            stages.append(_stage(block, branches, depth, channels, out_channels, stride))
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.finish(widths[-1], num_classes=num_classes, drop_rate=drop_rate, global_pool=global_pool)


def _stage(
    block: str, branches: int | None, depth: int, in_channels: int, out_channels: int, stride: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        strides = (stride, stride) if index == 0 else (1, 1)
        inputs = in_channels if index == 0 else out_channels
        geometry = Geometry(inputs, out_channels, (3, 3), stride=strides, padding=(1, 1))
        layers.append(make_block(block, geometry, copies=branches))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


default_cfgs = generate_default_cfgs(
    {
        f"repvgg_{size}_cifar.untrained": small_cfg(first_conv="stages.0.0.trunk.conv", classifier="head", pool_size=8)
        for size in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RepVggCifar:
    return build_model_with_cfg(RepVggCifar, variant, pretrained, **kwargs)


@register_model
def repvgg_a0_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-A0 for CIFAR: 0.39 M parameters deployed."""
    return _create("repvgg_a0_cifar", pretrained, depths=DEPTHS_A, width=0.75, last_width=2.5, **kwargs)


@register_model
def repvgg_a1_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-A1 for CIFAR: 0.64 M parameters deployed."""
    return _create("repvgg_a1_cifar", pretrained, depths=DEPTHS_A, width=1, last_width=2.5, **kwargs)


@register_model
def repvgg_a2_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-A2 for CIFAR: 1.37 M parameters deployed."""
    return _create("repvgg_a2_cifar", pretrained, depths=DEPTHS_A, width=1.5, last_width=2.75, **kwargs)


@register_model
def repvgg_b0_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-B0 for CIFAR: 0.74 M parameters deployed."""
    return _create("repvgg_b0_cifar", pretrained, depths=DEPTHS_B, width=1, last_width=2.5, **kwargs)


@register_model
def repvgg_b1_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-B1 for CIFAR: 2.84 M parameters deployed."""
    return _create("repvgg_b1_cifar", pretrained, depths=DEPTHS_B, width=2, last_width=4, **kwargs)


@register_model
def repvgg_b2_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-B2 for CIFAR: 4.43 M parameters deployed."""
    return _create("repvgg_b2_cifar", pretrained, depths=DEPTHS_B, width=2.5, last_width=5, **kwargs)


@register_model
def repvgg_b3_cifar(pretrained: bool = False, **kwargs: Any) -> RepVggCifar:
    """RepVGG-B3 for CIFAR: 6.26 M parameters deployed."""
    return _create("repvgg_b3_cifar", pretrained, depths=DEPTHS_B, width=3, last_width=5, **kwargs)
