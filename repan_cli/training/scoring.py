"""How good a network is, in detail: accuracy of each class, calibration, confusion, and where two networks differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repan_cli.data.batches import Loader
from repan_cli.errors import InputError, is_out_of_memory
from repan_cli.system.text import count
from repan_cli.training.evaluation import Score, check_logits, eval_batch, score_batch, score_of

BINS = 15
"""Of confidence, equally wide (Guo et al. 2017)."""


@dataclass(frozen=True)
class Details:
    """The predictions of a network for the images of a part.

    `confusion` (C, C) counts images of class i that were taken for class j, `predicted` (N,) holds the class of each
    image. `calibration_error` is the expected calibration error in percent: the mean over images of how far the
    accuracy of their confidence's bin is from its mean confidence (Guo et al. 2017).
    """

    score: Score
    confusion: Tensor
    predicted: Tensor
    calibration_error: float

    def class_accuracy(self) -> list[float | None]:
        """Return the percentage of each class that was recognised; None where it has no image."""
        totals = self.confusion.sum(dim=1)
        correct = self.confusion.diagonal()
        return [
            100 * right / total if total else None
            for right, total in zip(correct.tolist(), totals.tolist(), strict=True)
        ]


@torch.no_grad()
def examine(model: nn.Module, images: Loader, classes: int) -> tuple[Details, int]:
    """Score a network in eval mode, in float32, and the batch it took: half as many where memory did not suffice.

    Raises InputError for a network whose logits are not finite.
    """
    model.eval()
    size = eval_batch(images)
    while True:
        try:
            return _examined(model, images, classes, size), size
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size //= 2
            if images.device.type == "cuda":
                torch.cuda.empty_cache()


def _examined(model: nn.Module, images: Loader, classes: int, size: int) -> Details:
    totals = torch.zeros(3, device=images.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=images.device)
    bins = torch.zeros(3, BINS, dtype=torch.float64, device="cpu")
    predicted = []
    broken = 0
    for batch, labels, *_ in images.batches(size):
        logits = model(batch)
        check_logits(logits, len(batch), classes)
        totals += score_batch(logits, labels)
        broken += int((~logits.isfinite().all(dim=1)).sum())
        confidence, found = logits.float().softmax(dim=1).max(dim=1)
        confusion += torch.bincount(labels * classes + found, minlength=classes * classes)
        bins += _binned(confidence.cpu().double(), (found == labels).cpu().double())
        predicted.append(found.cpu())
    if broken:
        raise InputError(
            f"no finite logits for {broken:,} of {count(images.count, 'image')}, so that figures mean nothing: take a "
            "checkpoint from before the network diverged"
        )
    counts, sure, right = bins
    error = 100 * ((sure - right).abs().sum() / counts.sum()).item()
    return Details(score_of(totals, images.count), confusion.view(classes, classes).cpu(), torch.cat(predicted), error)


def _binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Images, confidence and correct predictions, summed by bin of confidence, (3, BINS)."""
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return torch.stack(
        [torch.bincount(place, weights, BINS) for weights in (torch.ones_like(right), confidence, right)]
    )


def agreement(one: Details, other: Details) -> float:
    """The percentage of images that both take for the same class."""
    return 100 * (one.predicted == other.predicted).double().mean().item()


def worst_confusions(confusion: Tensor, count: int) -> Iterator[tuple[int, int, int]]:
    """Class, what it was taken for, and how often: the most frequent mistakes first."""
    wrong = confusion - torch.diag(confusion.diagonal())
    for place in wrong.flatten().argsort(descending=True, stable=True)[:count].tolist():
        one, other = divmod(place, len(confusion))
        if wrong[one, other]:
            yield one, other, int(wrong[one, other])
