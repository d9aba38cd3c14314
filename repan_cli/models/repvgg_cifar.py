"""RepVGG for small images: the narrow networks that RepAn's CIFAR results are stated for, registered with timm.

Five stages of blocks with strides 1, 1, 2, 2, 1, then average pooling and a linear classifier. `repvgg_a1_cifar`
deploys with 0.64 M parameters at 100 classes, a twentieth of timm's `repvgg_a1`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from repan_cli.blocks import Geometry, make_block

STRIDES = (1, 1, 2, 2, 1)
BASE_WIDTHS = (16, 16, 32, 64, 64)
DEPTHS_A = (1, 2, 4, 14, 1)
DEPTHS_B = (1, 4, 6, 16, 1)


class RepVggCifar(nn.Module):
    """A RepVGG network for images of about 8 to 64 pixels.

    Args:
        depths: blocks per stage.
        width: factor on the widths of the first four stages (the first stage has at most 16 channels).
        last_width: factor on the width of the last stage.
        num_classes: outputs; 0 leaves the classifier out.
        in_chans: channels of the input.
        block: block family, see `repan_cli.blocks.FAMILIES`.
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
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        factors = (width, width, width, width, last_width)
        widths = [int(base * factor) for base, factor in zip(BASE_WIDTHS, factors, strict=True)]
        widths[0] = min(BASE_WIDTHS[0], widths[0])
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]

        stages, channels = [], in_chans
        for depth, out_channels, stride in zip(depths, widths, STRIDES, strict=True):
            stages.append(_stage(block, depth, channels, out_channels, stride))
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self._set_classifier(global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_features, H / 4, W / 4)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (N, num_features), or with the classifier logits (N, num_classes)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes`."""
        self.num_classes = num_classes
        pool_type = global_pool or self.global_pool.pool_type
        self._set_classifier(pool_type, device=next(self.parameters()).device)

    def _set_classifier(self, pool_type: str, device: torch.device | None = None) -> None:
        parts = create_classifier(self.num_features, self.num_classes, pool_type=pool_type, drop_rate=self.drop_rate)
        self.global_pool, self.head_drop, self.head = (part.to(device) for part in parts)


def _stage(block: str, depth: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    layers = []
    for index in range(depth):
        strides = (stride, stride) if index == 0 else (1, 1)
        inputs = in_channels if index == 0 else out_channels
        layers.append(make_block(block, Geometry(inputs, out_channels, (3, 3), stride=strides, padding=(1, 1))))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5071, 0.4866, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "first_conv": "stages.0.0.trunk.conv",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"repvgg_{size}_cifar.untrained": _cfg() for size in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")}
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
