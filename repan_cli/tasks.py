"""What is trained for: a task maps images and labels to a loss and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Task(Protocol):
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,) to the mean loss, a scalar, and logits (N, num_classes)."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy, computed in float32."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images).float()
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits
