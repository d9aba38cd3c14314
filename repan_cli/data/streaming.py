"""Read images one by one in worker processes, and transform them as pictures.

Small images are padded, cropped and flipped. Large ones are cropped and resized by timm's transforms. Everything random
about an image is drawn from its position, (seed, cycle, epoch, index), so it depends neither on the number of workers
nor on where a run began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from repan_cli.data.batches import Batch, EpochPlan, Loader
from repan_cli.data.image_files import ArrayReader, UnreadableImageError
from repan_cli.data.policies import policy
from repan_cli.data.preprocess import MiddleCrop
from repan_cli.data.types import ArrayImages, LazyImages, Part
from repan_cli.data.workers import Problems, Samples, check_room, loading
from repan_cli.system.host import usable_cores
from repan_cli.system.launcher import local_ranks
from repan_cli.system.notices import warn

MOST_WORKERS = 16


class StreamingLoader(Loader):
    """The images of one part of a data set, read one by one.

    Args:
        part: pictures, or images in memory that need a policy.
        resized: whether a part of each image is cropped and resized; otherwise all have the right size and are padded.
        policy_of: the data set for which AutoAugment's policy was found.
        workers: the number of worker processes; 0 loads in this process.
        skip: whether training images that cannot be read are left out.
        crop: the part of a resized image that is used for scoring.
        **options: as for `Loader`.
    """

    def __init__(
        self,
        part: Part,
        *,
        resized: bool,
        policy_of: str = "imagenet",
        workers: int = 0,
        skip: bool = False,
        crop: MiddleCrop | None = None,
        **options: Any,
    ) -> None:
        super().__init__(count=len(part.labels), **options)
        if isinstance(part, ArrayImages):
            part = LazyImages(ArrayReader(part.images, part.names), part.labels, np.arange(len(part.labels)))
        self.part, self.resized, self.policy_of = part, resized, policy_of
        self.workers, self.skip, self.crop = workers, skip, crop or MiddleCrop()
        self.skipped: set[str] = set()

    @property
    def unnumbered(self) -> str | None:
        crops_at_random = self.resized and self.augmentation.random_crop
        return "data.crop=resized" if crops_at_random else self.augmentation.unnumbered

    def _training(self, rows: Sequence[Tensor], plan: EpochPlan, position: tuple[int, ...]) -> Iterator[Batch]:
        samples = Samples(self.part, self._training_transform(), position, skip=self.skip)
        yield from self._load(samples, rows, mend="; data.on_error=skip skips such training images")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        samples = Samples(self.part, self._plain_transform(), None, skip=False)
        yield from self._load(samples, torch.arange(self.count).split(batch_size)[self.rank :: self.ranks])

    def _load(self, samples: Samples, rows: Sequence[Tensor], *, mend: str = "") -> Iterator[Batch]:
        with loading(samples, rows, self.workers, pin=self.device.type == "cuda") as coming:
            for images, labels, index, problems in coming.taken(lambda: self.stop()):
                self._note(problems, mend)
                images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
                yield Batch(self._normalized(images), labels, index, torch.zeros_like(index))

    def check_room(self, batch_size: int) -> None:
        share = -(-batch_size // self.ranks)
        check_room(share, self.channels * self.size**2, self.workers, self.count)

    def _note(self, problems: Problems, mend: str) -> None:
        """Warn once about each image that could not be read; if it has no replacement, end the run."""
        for problem, fatal in problems.items():
            if fatal is not None:
                raise fatal(problem + mend if fatal is UnreadableImageError else problem)
            if problem not in self.skipped:
                self.skipped.add(problem)
                warn(f"{problem}; left out of training ({len(self.skipped)} so far)")

    def _normalized(self, images: Tensor) -> Tensor:
        scale, shift = (each.view(1, -1, 1, 1) for each in (self.scale, self.shift))
        return torch.addcmul(shift, images.float(), scale).contiguous(memory_format=self.memory_format)

    def _training_transform(self) -> Any:
        chosen, steps = self.augmentation, []
        if not chosen.random_crop:
            return self._plain_transform()
        if self.resized:
            whole = create_transform(
                self.size,
                is_training=True,
                use_prefetcher=True,
                scale=(chosen.least_area, 1.0),
                hflip=0.5 if chosen.flip else 0.0,
                color_jitter=None,  # type: ignore[arg-type]  # off, which timm's types forget
                interpolation="bicubic",
            )
            steps += [*whole.transforms[:-1]]
        else:
            steps += [transforms.RandomCrop(self.size, chosen.padding)] if chosen.padding else []
            steps += [transforms.RandomHorizontalFlip()] if chosen.flip else []
        steps += [policy(chosen.policy, self.policy_of, self.channels)] if chosen.policy else []
        return transforms.Compose([*steps, functional.pil_to_tensor])

    def _plain_transform(self) -> Any:
        if not self.resized:
            return functional.pil_to_tensor
        return self.crop.transform(self.size)


def default_workers(device: torch.device) -> int:
    """Return the default number of workers: one per core with a GPU, shared by the machine's ranks; one on a CPU.

    On a CPU the cores are needed for training.
    """
    return max(1, min(MOST_WORKERS, usable_cores() // local_ranks())) if device.type == "cuda" else 1
