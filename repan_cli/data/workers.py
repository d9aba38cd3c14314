"""Start worker processes that load images, limit the time spent waiting for them, and end them.

Workers may hang, on a file on a lost network drive or on full shared memory. Waiting therefore checks for stop signals,
reports after a while what it waits for, and ends at a limit.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from repan_cli.data.image_files import UnreadableImageError
from repan_cli.data.types import LazyImages
from repan_cli.errors import InputError, RepanError, StoppedError, StuckLoaderError
from repan_cli.system.launcher import local_ranks
from repan_cli.system.notices import warn
from repan_cli.system.seeding import seed_for
from repan_cli.system.signals import STOP_SIGNALS

LOOK, SAID_AFTER, LIMIT = 1.0, 30.0, 300.0
"""Seconds between two checks for stop signals, until the wait is reported, and until the wait ends the run."""

AHEAD = 2
"""The number of batches that each process has loaded or is loading, PyTorch's default."""

SHARED = Path("/dev/shm")
"""The shared memory on Linux, which holds loaded batches until they are used; Docker gives it 64 MB."""


def check_room(batch: int, pixels: int, workers: int, images: int) -> None:
    """Raise InputError if the shared memory cannot hold the batches that are loaded ahead.

    Each of this machine's ranks has `workers` processes, which load batches of `batch` images of `pixels` bytes each.
    The part has `images` images.
    """
    if not workers or not SHARED.is_dir():
        return
    ahead = min(AHEAD * workers, -(-images // batch))
    needed, free = batch * pixels * ahead * local_ranks(), shutil.disk_usage(SHARED).free
    if needed > free:
        raise InputError(
            f"{SHARED} has {free / 1e6:,.0f} MB free, and the batches that {workers} processes load ahead take "
            f"{needed / 1e6:,.0f} MB: enlarge it (docker run --shm-size={-(-needed * 2 // 10**9)}g), or set "
            "data.workers=0, or a smaller --batch-size"
        )


# ---------------------------------------------------------------------------------------------- within them


class Sample(NamedTuple):
    """A picture, uint8 (C, H, W), and its number in the part, or the reason why it could not be read.

    `fatal` is the kind of the error that ends the run; None if another picture was read instead.
    """

    image: Tensor | None
    label: int
    place: int
    problem: str = ""
    fatal: type[RepanError] | None = None


class Samples(Dataset[Sample]):
    """The samples of a part, for worker processes.

    With a position they are training samples. With `skip`, the next readable sample replaces an unreadable one.
    """

    def __init__(self, part: LazyImages, transform: Any, position: tuple[int, ...] | None, *, skip: bool) -> None:
        self.at: Any = None  # the image that each process reads; -1 between two images
        self.part, self.transform, self.position, self.skip = part, transform, position, skip

    def __len__(self) -> int:
        return len(self.part.labels)

    @contextlib.contextmanager
    def _noted(self, number: int) -> Iterator[None]:
        """Tell other processes which image this process is reading."""
        worker = get_worker_info()
        if worker is None or self.at is None:
            yield
            return
        self.at[worker.id] = number
        try:
            yield
        finally:
            self.at[worker.id] = -1

    def __getitem__(self, index: int) -> Sample:
        problem = ""
        for place in range(index, index + len(self)):
            number = place % len(self)
            try:
                with self._noted(number):
                    picture = self.part.read(int(self.part.index[number]))
            except UnreadableImageError as error:
                if not self.skip or not error.may_be_skipped:
                    return Sample(None, 0, index, str(error), type(error))
                problem = problem or str(error)
                continue
            except RepanError as error:  # a process of a DataLoader would lose its class and its line
                return Sample(None, 0, index, str(error), type(error))
            if self.position is not None:
                _seed(seed_for("picture", *self.position, index))
            return Sample(self.transform(picture), int(self.part.labels[number]), number, problem)
        return Sample(None, 0, index, problem, UnreadableImageError)


def _seed(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # torch.manual_seed, which seeds every device, takes 0.1 ms


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """Give this process its generators back after it has loaded images itself.

    Dropout, or a user's own blocks, would otherwise draw other numbers with `data.workers=0` than with processes.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def ignore_signals(worker: int) -> None:
    """Ignore signals in a worker: the main process decides when a run stops, and its workers must not die first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


Problems = dict[str, type[RepanError] | None]
"""The images that could not be read, each with the kind of the error that ends the run, or None."""


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Problems]:
    """Return images (B, C, H, W), labels (B,), indices (B,), and the images that could not be read."""
    problems = {sample.problem: sample.fatal for sample in samples if sample.problem}
    read = [(sample.image, sample.label, sample.place) for sample in samples if sample.image is not None]
    images = torch.stack([image for image, _, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label, _ in read])
    return images, labels, torch.tensor([place for _, _, place in read]), problems


# ---------------------------------------------------------------------------------------------- from outside


@contextlib.contextmanager
def loading(samples: Samples, rows: Sequence[Tensor], workers: int, *, pin: bool) -> Iterator[Loading]:
    """Load the batches of `rows` in `workers` processes, or in this one if 0, and end the processes when the context
    ends.
    """
    samples.at = multiprocessing.RawArray("q", [-1] * workers) if workers else None
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=[row.tolist() for row in rows],
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        pin_memory=pin,
        generator=torch.Generator(),  # the global generator stays as it is
        timeout=LOOK if workers else 0,
    )
    iterator = iter(loader)
    try:
        yield Loading(samples, iterator, len(rows))
    except Exception:
        _kill(iterator)
        raise


class Loading:
    """Batches that are being loaded; `taken(stop)` yields them."""

    def __init__(self, samples: Samples, iterator: Any, count: int) -> None:
        self.samples, self.iterator, self.count = samples, iterator, count

    def taken(self, stop: Callable[[], bool]) -> Iterator[tuple[Tensor, Tensor, Tensor, Problems]]:
        """Yield the batches.

        Raises StoppedError if `stop` returns true during a wait, StuckLoaderError if no batch arrives within the limit.
        """
        for _ in range(self.count):
            yield self._next(stop)

    def _next(self, stop: Callable[[], bool]) -> tuple[Tensor, Tensor, Tensor, Problems]:
        began, said = time.monotonic(), False
        while True:
            try:
                with contextlib.nullcontext() if self.samples.at else _kept_generators():
                    return next(self.iterator)
            except RuntimeError as error:  # PyTorch's own begin so; an error within a process is quoted behind "Caught"
                if str(error).startswith("DataLoader worker"):
                    raise StuckLoaderError(f"a process that loads images has died; {self._where()}") from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if stop():
                raise StoppedError
            waited = time.monotonic() - began
            if waited > LIMIT:
                raise StuckLoaderError(f"no images arrived for {LIMIT:g} s; {self._where()}")
            if waited > SAID_AFTER and not said:
                said = True
                warn(f"no images arrived for {waited:.0f} s; {self._where()}")

    def _where(self) -> str:
        """Describe which images the processes read, and the free space where they put them."""
        part = self.samples.part
        read = [part.read.name(int(part.index[number])) for number in self.samples.at if number >= 0]
        parts = [f"being read: {', '.join(read)}"] if read else []
        if SHARED.is_dir():
            room = shutil.disk_usage(SHARED)
            parts.append(f"{SHARED} has {room.free / 1e6:,.0f} of {room.total / 1e6:,.0f} MB free")
        return "; ".join(parts)


def _kill(iterator: Any) -> None:
    """End the processes of a DataLoader even if they hang: they ignore SIGTERM, and its own shutdown waits for each."""
    if not getattr(iterator, "_workers", None):
        return
    iterator._shutdown = True  # leave nothing to its destructor
    if iterator._worker_pids_set:
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join(LOOK)
