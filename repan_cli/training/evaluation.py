"""Score a network on the images of one part of a data set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.data.batches import Loader
from repan_cli.errors import InputError, StoppedError
from repan_cli.system.ranks import summed
from repan_cli.training.cuda_graphs import Graphs

EVAL_BATCH, EVAL_PIXELS = 1000, 1000 * 64 * 64
"""Limits on the images, and on their pixels, of a batch that is only scored."""


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and mean cross-entropy over `images` images.

    `top5` is None with five classes or fewer, since it would be 100 for any network.
    """

    top1: float
    top5: float | None
    loss: float
    images: int

    def figures(self) -> dict[str, Any]:
        """Return the known figures by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(model: nn.Module, images: Loader, stop: Callable[[], bool] = bool, graphs: Graphs | None = None) -> Score:
    """Score a network in eval mode, in float32: the same weights give the same figures wherever they are reported.

    `graphs` records the computation, for a network that is scored often. Raises StoppedError, between two batches, if
    `stop` returns true.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, device=images.device)
    for batch, labels, *_ in images.batches(eval_batch(images)):
        if stop():
            model.train(was_training)
            raise StoppedError
        if graphs is None:
            totals += score_batch(model(batch), labels)
        else:
            key = ("evaluate", model, batch.shape)
            totals += graphs(key, lambda given: score_batch(model(given[0]), given[1]), (batch, labels))
    model.train(was_training)
    if images.ranks > 1:
        totals = summed(totals)
    return score_of(totals, images.count)


def check_logits(logits: object, images: int, classes: int) -> None:
    """Raise InputError for outputs that are not one logit per class for each image."""
    if not isinstance(logits, Tensor):
        raise InputError(f"the network returns a {type(logits).__name__}, not one tensor of logits")
    if tuple(logits.shape) != (images, classes):
        found = "x".join(map(str, logits.shape))
        raise InputError(
            f"the network returns {found} numbers for {images} images, not one for each of {classes} classes"
        )


def score_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """Return sums over a batch, (3,): top-1 correct, top-5 correct (NaN with five classes or fewer), cross-entropy."""
    if not isinstance(logits, Tensor):
        raise InputError(f"the network returns a {type(logits).__name__}, not one tensor of logits")
    known = logits.shape[1]
    ranks = logits.topk(min(5, known), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([ranks[:, 0].sum(), ranks.sum() if known > 5 else torch.full_like(loss, torch.nan), loss])


def score_of(totals: Tensor, count: int) -> Score:
    """Return the score for sums over `count` images."""
    top1, top5, loss = (value / count for value in totals.tolist())
    return Score(100 * top1, None if math.isnan(top5) else 100 * top5, loss, count)


def eval_batch(images: Loader) -> int:
    """Return the batch size for evaluation."""
    return max(1, min(EVAL_BATCH, EVAL_PIXELS // images.size**2))
