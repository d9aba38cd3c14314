"""Define training tasks: a task maps a batch to a loss and logits."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.data.batches import Batch
from repan_cli.training.plan import Phase
from repan_cli.training.teacher import LogitCache, Teacher


class Task(Protocol):
    @property
    def recorded_as(self) -> Hashable:
        """Return the identity of the task's computation, on which recordings depend."""

    def prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches with values that are looked up for them before the step."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, a scalar, and its logits (B, num_classes)."""


class TaskProvider(Protocol):
    """The tasks of the phases of a run.

    `digests` and `described` hold information on the teachers by their names in the settings. `folder` is the run's
    folder, once it is known. `resumed_in` is the cycle in which a resumed run continues.
    """

    digests: dict[str, str]
    described: dict[str, str]
    folder: Path | None
    resumed_in: int | None

    def prepare(self, plan: Sequence[Phase]) -> None:
        """Find the teachers of all phases, so that an error in one is known before the first step."""

    def __call__(self, phase: Phase) -> Task:
        """Return the task of a phase that begins."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy in float32; with `binary` the sum over classes of the binary cross-entropy (Wightman et al.
    2021).
    """

    label_smoothing: float = 0.0
    binary: bool = False

    @property
    def recorded_as(self) -> Hashable:
        return self

    def prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return batches

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images).float()
        return self.loss(logits, batch.labels), logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (B, num_classes) for labels (B,) or their shares (B, num_classes)."""
        if not self.binary:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        classes = logits.shape[1]
        shares = F.one_hot(labels, classes).float() if labels.ndim == 1 else labels
        shares = shares * (1 - self.label_smoothing) + self.label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, shares, reduction="sum") / len(logits)


@dataclass(frozen=True)
class Distillation:
    """`alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE`, batch means in float32 (Hinton et al. 2015).

    `teacher` returns its logits (B, num_classes) for a batch that has none yet. Soft targets use `temperature` T.
    """

    hard: Classification
    teacher: Teacher | LogitCache
    alpha: float
    temperature: float

    @property
    def recorded_as(self) -> Hashable:
        return self.hard, self.alpha, self.temperature, self.teacher.recorded_as

    def prepared(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self.teacher.prepared(batches)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images).float()
        wanted = self.teacher(batch) if batch.teacher is None else batch.teacher
        student, teacher = (F.log_softmax(each / self.temperature, dim=1) for each in (logits, wanted.float()))
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        soft = self.temperature**2 * divergence
        return self.alpha * soft + (1 - self.alpha) * self.hard.loss(logits, batch.labels), logits
