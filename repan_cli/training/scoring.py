"""Score a network in detail: accuracy of each class, calibration, confusion, and disagreement of two networks."""

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
"""The number of confidence bins, equally wide (Guo et al. 2017)."""


@dataclass(frozen=True)
class Details:
    """The predictions of a network for the images of a part.

    `labels` and `predicted` (N,) hold the true and the predicted class of each image, as positions in `classes`.
    `calibration_error` is the expected calibration error in percent (Guo et al. 2017). Images are binned by confidence.
    Each bin's accuracy is compared with its mean confidence, and the differences are averaged over the images.
    """

    score: Score
    labels: Tensor
    predicted: Tensor
    classes: int
    calibration_error: float

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return the pairs of true and predicted class, (P, 2), in order, and the number of images of each, (P,).

        There are at most as many pairs as images, while a full table would grow with the square of the classes.
        """
        found, counts = (self.labels * self.classes + self.predicted).unique(return_counts=True)
        return torch.stack([found // self.classes, found % self.classes], dim=1), counts

    def confusion(self) -> Tensor:
        """Return the number of images of class i that are predicted as class j, (C, C)."""
        pairs, counts = self.pairs()
        table = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        table[pairs[:, 0], pairs[:, 1]] = counts
        return table

    def class_images(self) -> list[int]:
        """Return the number of images of each class."""
        return torch.bincount(self.labels, minlength=self.classes).tolist()

    def class_accuracy(self) -> list[float | None]:
        """Return the percentage of each class that is predicted correctly; None for a class without images."""
        right = torch.bincount(self.labels[self.labels == self.predicted], minlength=self.classes).tolist()
        return [100 * good / all_ if all_ else None for good, all_ in zip(right, self.class_images(), strict=True)]


@torch.no_grad()
def examine(model: nn.Module, images: Loader, classes: int) -> tuple[Details, int]:
    """Score a network in eval mode, in float32. Return the details, and the batch size used: halved until memory
    sufficed.

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
    bins = torch.zeros(3, BINS, dtype=torch.float64, device="cpu")
    predicted, true = [], []
    broken = 0
    for batch, labels, *_ in images.batches(size):
        logits = model(batch)
        check_logits(logits, len(batch), classes)
        totals += score_batch(logits, labels)
        broken += int((~logits.isfinite().all(dim=1)).sum())
        confidence, found = logits.float().softmax(dim=1).max(dim=1)
        bins += _binned(confidence.cpu().double(), (found == labels).cpu().double())
        predicted.append(found.cpu())
        true.append(labels.cpu())
    if broken:
        raise InputError(
            f"the network gives no finite logits for {broken:,} of {count(images.count, 'image')}, so the results are "
            "meaningless: use a checkpoint from before it diverged"
        )
    counts, sure, right = bins
    error = 100 * ((sure - right).abs().sum() / counts.sum()).item()
    return Details(score_of(totals, images.count), torch.cat(true), torch.cat(predicted), classes, error)


def _binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Return the number of images, the sum of confidences and the correct predictions per bin of confidence,
    (3, BINS).
    """
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return torch.stack(
        [torch.bincount(place, weights, BINS) for weights in (torch.ones_like(right), confidence, right)]
    )


def agreement(one: Details, other: Details) -> float:
    """Return the percentage of images for which both networks predict the same class."""
    return 100 * (one.predicted == other.predicted).double().mean().item()


def worst_confusions(details: Details, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield class, predicted class and count for each kind of mistake, the most frequent first."""
    pairs, counts = details.pairs()
    wrong = pairs[:, 0] != pairs[:, 1]
    pairs, counts = pairs[wrong], counts[wrong]
    for place in counts.argsort(descending=True, stable=True)[:count].tolist():
        one, other = pairs[place].tolist()
        yield one, other, int(counts[place])
