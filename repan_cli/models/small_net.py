"""The common parts of repan's networks for small images: pretrained configuration, pooling and classifier."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import create_classifier
from torch import Tensor, nn


def small_cfg(*, first_conv: str, classifier: str, pool_size: int) -> dict[str, Any]:
    """Return timm's description of a network for CIFAR images, without weights."""
    return {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5071, 0.4866, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }


class SmallNet(nn.Module):
    """`stages`, then pooling, dropout and a linear classifier, with the methods that timm's networks have.

    A subclass sets `self.stages`, (N, in_chans, H, W) to (N, num_features, h, w), and calls `finish`.
    """

    stages: nn.Module

    def finish(self, num_features: int, *, num_classes: int, drop_rate: float, global_pool: str) -> None:
        """Add the head; with 0 classes there is none."""
        self.num_features = self.head_hidden_size = num_features
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self._set_classifier(global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features (N, num_features, h, w) of images (N, in_chans, H, W)."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return pooled features (N, num_features), or with the classifier logits (N, num_classes)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes`."""
        self.num_classes = num_classes
        pool_type = global_pool or self.global_pool.pool_type
        self._set_classifier(pool_type, device=next(self.parameters()).device)

    def _set_classifier(self, pool_type: str, device: torch.device | None = None) -> None:
        parts = create_classifier(self.num_features, self.num_classes, pool_type=pool_type, drop_rate=self.drop_rate)
        self.global_pool, self.head_drop, self.head = (part.to(device) for part in parts)
