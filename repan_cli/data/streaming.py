"""Images that are read one by one, by processes that load, and transformed as pictures.

Small images are padded, cropped and flipped; of large ones a part is cropped and resized, by timm's transforms. What
is random about an image is drawn from its position, (seed, cycle, epoch, index): it depends neither on how many
processes load nor on where a run began.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional

from repan_cli.data.batches import Batch, EpochPlan, Loader
from repan_cli.data.image_files import ArrayReader, UnreadableImageError
from repan_cli.data.policies import policy
from repan_cli.data.preprocess import CROP_SHARE, middle
from repan_cli.data.types import ArrayImages, LazyImages, Part
from repan_cli.errors import InputError
from repan_cli.system.host import usable_cores
from repan_cli.system.launcher import local_ranks
from repan_cli.system.notices import warn
from repan_cli.system.seeding import seed_for
from repan_cli.system.signals import STOP_SIGNALS

MOST_WORKERS = 16


class _Sample(NamedTuple):
    """A picture (C, H, W) in uint8 and its place in the part, or why it could not be read."""

    image: Tensor | None
    label: int
    place: int
    problem: str = ""


class _Loaded(Dataset[_Sample]):
    """The samples of a part for the processes that load. With a position, training samples; unreadable ones are
    replaced by the next that can be read where `skip` says so.
    """

    def __init__(self, part: LazyImages, transform: Any, position: tuple[int, ...] | None, *, skip: bool) -> None:
        self.part, self.transform, self.position, self.skip = part, transform, position, skip

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, index: int) -> _Sample:
        problem = ""
        for place in range(index, index + len(self)):
            number = place % len(self)
            try:
                picture = self.part.read(int(self.part.index[number]))
            except UnreadableImageError as error:
                problem = problem or str(error)
                if not self.skip:
                    break
                continue
            if self.position is not None:
                _seed(seed_for("picture", *self.position, index))
            return _Sample(self.transform(picture), int(self.part.labels[number]), number, problem)
        return _Sample(None, 0, index, problem)


def _seed(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # torch.manual_seed, which seeds every device, takes 0.1 ms


def _ignore_signals(worker: int) -> None:
    """The main process decides when a run stops: its workers must not die first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class StreamingLoader(Loader):
    """The images of one part of a data set, read one by one.

    Args:
        part: pictures, or images in memory that a policy is applied to.
        resized: a part of each image is cropped and resized; otherwise all have the size already and are padded.
        policy_of: what its AutoAugment policy was found for.
        workers: processes that load; 0 is this one.
        skip: leave out training images that cannot be read.
        share: how much of a resized image is looked at where it is only scored, as a part of its side.
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
        share: float = CROP_SHARE,
        **options: Any,
    ) -> None:
        super().__init__(count=len(part.labels), **options)
        if isinstance(part, ArrayImages):
            part = LazyImages(ArrayReader(part.images), part.labels, np.arange(len(part.labels)))
        self.part, self.resized, self.policy_of = part, resized, policy_of
        self.workers, self.skip, self.share = workers, skip, share
        self.skipped: set[str] = set()

    @property
    def unnumbered(self) -> str | None:
        return "data.crop=resized" if self.resized else self.augmentation.unnumbered

    def _training(self, rows: Sequence[Tensor], plan: EpochPlan, position: tuple[int, ...]) -> Iterator[Batch]:
        samples = _Loaded(self.part, self._training_transform(), position, skip=self.skip)
        yield from self._load(samples, rows, mend="; data.on_error=skip leaves such training images out")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        samples = _Loaded(self.part, self._plain_transform(), None, skip=False)
        yield from self._load(samples, torch.arange(self.count).split(batch_size)[self.rank :: self.ranks])

    def _load(self, samples: _Loaded, rows: Sequence[Tensor], *, mend: str = "") -> Iterator[Batch]:
        loader = DataLoader(
            samples,
            batch_sampler=[row.tolist() for row in rows],
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the global one stays as it is
        )
        for images, labels, index, problems in loader:
            self._note(problems, mend)
            images, labels = (each.to(self.device, non_blocking=True) for each in (images, labels))
            yield Batch(self._normalised(images), labels, index, torch.zeros_like(index))

    def _note(self, problems: dict[str, bool], mend: str) -> None:
        """Say once of each image that could not be read; one without a replacement ends the run."""
        for problem, fatal in problems.items():
            if fatal:
                raise InputError(problem + mend)
            if problem not in self.skipped:
                self.skipped.add(problem)
                warn(f"{problem}; left out of training ({len(self.skipped)} so far)")

    def _normalised(self, images: Tensor) -> Tensor:
        scale, shift = (each.view(1, -1, 1, 1) for each in (self.scale, self.shift))
        return torch.addcmul(shift, images.float(), scale).contiguous(memory_format=self.memory_format)

    def _training_transform(self) -> Any:
        chosen, steps = self.augmentation, []
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
        steps += [policy(chosen.policy, self.policy_of)] if chosen.policy else []
        return transforms.Compose([*steps, functional.pil_to_tensor])

    def _plain_transform(self) -> Any:
        if not self.resized:
            return functional.pil_to_tensor
        return middle(self.size, self.share)


def _collate(samples: list[_Sample]) -> tuple[Tensor, Tensor, Tensor, dict[str, bool]]:
    """Return images (B, C, H, W), labels (B,), indices (B,), and what could not be read, with whether it is fatal."""
    problems = {sample.problem: sample.image is None for sample in samples if sample.problem}
    read = [(sample.image, sample.label, sample.place) for sample in samples if sample.image is not None]
    images = torch.stack([image for image, _, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label, _ in read])
    return images, labels, torch.tensor([place for _, _, place in read]), problems


def default_workers(device: torch.device) -> int:
    """One process a core beside a GPU, shared by the ranks of this machine; on a CPU, which trains itself, one."""
    return max(1, min(MOST_WORKERS, usable_cores() // local_ranks())) if device.type == "cuda" else 1
