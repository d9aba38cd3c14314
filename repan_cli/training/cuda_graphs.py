"""CUDA graphs: work on the device that is recorded once, and from then on replayed as one launch.

What recorded work reads and writes must stay where it is: inputs are copied into buffers of its own, and weights,
optimizer memory, attach rates and learning rates only ever change in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.system.text import first_line

WARM_UPS = 3
"""How often work runs as it is before it is recorded: libraries choose and load their kernels meanwhile."""

Inputs = tuple[Tensor, ...]
Work = Callable[[Inputs], Tensor]


class Recorder(Protocol):
    """How work is recorded."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work once, where it would be recorded."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record the work without doing it: what replays it, and the tensor that its result then lies in."""


class CudaRecorder:
    """Records on a stream of its own; all recordings share their memory, as they are never replayed side by side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            result = work()
        usual.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # threads that load or pin images may go on calling CUDA meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    inputs: Inputs
    replay: Callable[[], None]
    result: Tensor


class Graphs:
    """Work by its key: the first times done as it is, then recorded, then replayed.

    Work of the same key must, in the same scope, be the same computation on inputs of the same shapes. Where it cannot
    be recorded, it is done as it is from then on, and `refused` says why; with `demanded` that raises InputError.
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
        """Begin work of a scope, on tensors that lie in `storage`: recordings of another scope are forgotten."""
        if scope != self._scope:
            self.recordings.clear()
            self._done.clear()
        else:
            assert storage == self._storage, "something that recorded work reads or writes has moved"
        self._scope, self._storage = scope, storage

    def __call__(self, key: Hashable, work: Work, inputs: Inputs) -> Tensor:
        """The result of `work(inputs)`, valid until the same work is done again."""
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
            replay, result = self.recorder.record(lambda: work(own))
        except RuntimeError as error:
            self.refused = first_line(error)
            if self.demanded:
                raise InputError(
                    f"run.graph=on: this network's step cannot be recorded as a CUDA graph ({self.refused}); "
                    "set run.graph=off"
                ) from None
            return
        self.recordings[key] = _Recording(own, replay, result)
        self.recorded += 1
