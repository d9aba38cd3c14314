"""Record work on the device once as a CUDA graph, and replay it afterward as a single launch.

All memory that recorded work reads or writes must stay at its address. Inputs are copied into the recording's own
buffers. Weights, optimizer state, attach rates and learning rates only ever change in place.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.system.text import first_line

WARM_UPS = 3
"""The number of plain runs before work is recorded, in which libraries choose and load their kernels."""

Inputs = tuple[Tensor, ...]
Work = Callable[[Inputs], Tensor]


class Recorder(Protocol):
    """The interface of a recorder of work."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work once, in the place where it would be recorded."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record the work without doing it; return the function that replays it, and the tensor that will hold its
        result.

        Raises RuntimeError if that fails, with everything as it was before.
        """

    def fits(self) -> bool:
        """Return whether there is memory for a first recording next to work that is not recorded."""

    def forget(self) -> None:
        """Free the memory of recordings, none of which may be in use."""


class CudaRecorder:
    """Records on its own stream. All recordings share memory, since they are never replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.needed = 0

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        before = torch.cuda.memory_allocated(self.device)
        with torch.cuda.stream(self.stream):
            result = work()
        usual.wait_stream(self.stream)
        self.needed = max(self.needed, torch.cuda.max_memory_allocated(self.device) - before)
        return result

    def fits(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 2 * self.needed <= free + cached

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()  # a pool without graphs cannot be recorded into

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        usual = torch.cuda.current_stream(self.device)
        try:
            # threads that load or pin images may continue to call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            torch.cuda.set_stream(usual)  # PyTorch leaves the other stream current if ending a capture fails too
            with contextlib.suppress(RuntimeError):
                graph.reset()
            raise
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    inputs: Inputs
    replay: Callable[[], None]
    result: Tensor


class Graphs:
    """Work by key: done normally the first times, then recorded, then replayed.

    Within a scope, work with the same key must be the same computation on inputs of the same shapes. If work cannot be
    recorded, it is done normally from then on, and `refused` holds the reason. With `demanded` that raises InputError.
    """

    def __init__(self, recorder: Recorder, *, demanded: bool = False) -> None:
        self.recorder, self.demanded = recorder, demanded
        self.refused: str | None = None
        self.recordings: dict[Hashable, _Recording] = {}
        self.recorded = 0
        self._done: Counter[Hashable] = Counter()
        self._scope: Hashable = None
        self._storage: frozenset[int] = frozenset()

    def enter(self, scope: Hashable, storage: frozenset[int]) -> None:
        """Begin the work of a scope, on tensors in `storage`. A new scope discards the recordings of the one before."""
        if scope != self._scope:
            if self.recordings:
                self.recordings.clear()
                self.recorder.forget()
            self._done.clear()
        else:
            assert storage == self._storage, "something that recorded work reads or writes has moved"
        self._scope, self._storage = scope, storage

    def __call__(self, key: Hashable, work: Work, inputs: Inputs) -> Tensor:
        """Return the result of `work(inputs)`, which is valid until the same work is done again."""
        if self.refused is None and key not in self.recordings and self._done[key] >= WARM_UPS:
            self._record(key, work, inputs)
        if key not in self.recordings:
            self._done[key] += 1
            return self.recorder.aside(lambda: work(inputs))
        recording = self.recordings[key]
        for place, given in zip(recording.inputs, inputs, strict=True):
            place.copy_(given, non_blocking=True)
        recording.replay()
        return recording.result

    def _record(self, key: Hashable, work: Work, inputs: Inputs) -> None:
        own = tuple(given.clone() for given in inputs)
        try:
            if not self.recordings and not self.demanded and not self.recorder.fits():
                raise torch.OutOfMemoryError
            replay, result = self.recorder.record(lambda: work(own))
        except RuntimeError as error:
            self.refused = _reason(error)
            _let_go(error)
            if not self.recordings:
                self.recorder.forget()
            if self.demanded:
                raise InputError(
                    f"run.graph=on: this network's step cannot be recorded as a CUDA graph ({self.refused}); "
                    "set run.graph=off"
                ) from None
            return
        self.recordings[key] = _Recording(own, replay, result)
        self.recorded += 1


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and the errors that were being handled when it was raised, the first one last."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__context__
    return found


def _reason(error: BaseException) -> str:
    """Return why a capture failed. The first error counts, because ending a broken capture raises another."""
    chain = _chain(error)
    if any(isinstance(each, torch.OutOfMemoryError) for each in chain):
        return "out of memory: the GPU does not hold a recording beside other work"
    return first_line(chain[-1])


def _let_go(error: BaseException) -> None:
    """Free the tensors of the work that failed, which the frames of its errors hold."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)
