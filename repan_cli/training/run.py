"""Hold everything that the training loop works on, in one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli.blocks import RepBlock, attach_rates, rep_blocks
from repan_cli.data.batches import Loader
from repan_cli.system.device import Runtime
from repan_cli.training import casts, optim
from repan_cli.training.average import WeightAverage
from repan_cli.training.cuda_graphs import Graphs
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Progress
from repan_cli.training.tasks import TaskProvider


@dataclass
class Training:
    """Everything that the training loop works on.

    Attributes:
        task_of: gives the task of a phase. It is asked once, when the phase begins and before its restart. Phases may
            differ in their task, and a teacher may be the network as it is at that point.
        val: the loader for validation; None if nothing was held out.
        restarted: the names of the blocks that restart; None means all.
        wrapped: the network as training calls it, for example compiled; None is the network itself.
        ema: a weight average, which is scored in the network's place.
        accumulate: the number of batches in an update.
        graphs: records and replays updates; None runs them normally.
        stop: asked wherever the run may take long without an event.
        patience: the number of epochs without a better validation top-1 after which the run ends.
        rates_are_one: the result of `read_attach_rates` at the start of the phase `rates_of`.
    """

    model: nn.Module
    task_of: TaskProvider
    optimizer: torch.optim.Optimizer
    plan: tuple[Phase, ...]
    train: Loader
    val: Loader | None
    test: Loader
    runtime: Runtime
    batch_size: int
    restarted: frozenset[str] | None = None
    seed: int = 0
    log_every: int = 20
    accumulate: int = 1
    wrapped: nn.Module | None = None
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    progress: Progress = field(default_factory=Progress)
    graphs: Graphs | None = None
    stop: Callable[[], bool] = bool
    patience: int | None = None
    rates_of: Phase | None = field(default=None, init=False)
    rates_are_one: tuple[bool, bool] = field(default=(False, False), init=False)

    def __post_init__(self) -> None:
        if self.graphs is not None:
            optim.rates_to_device(self.optimizer, self.runtime.device)

    @cached_property
    def attach_rates(self) -> list[Tensor]:
        """Return the attach rates of the restarting blocks."""
        return attach_rates(self.model, only=self.restarted)

    @cached_property
    def blocks(self) -> list[RepBlock]:
        return [block for _, block in rep_blocks(self.model)]

    def read_attach_rates(self) -> tuple[bool, bool]:
        """Return whether the attach rates of the restarting blocks, and those of the other blocks, are 1.

        This is a host-device sync.
        """
        steered = {id(rate) for rate in self.attach_rates}
        others = [block.attach_rate for block in self.blocks if id(block.attach_rate) not in steered]
        here, there = (all(rate == 1 for rate in _numbers(rates)) for rates in (self.attach_rates, others))
        return here, there

    @property
    def compiled(self) -> bool:
        return hasattr(self.called, "_orig_mod")

    @cached_property
    def cast(self) -> list[nn.Module]:
        """The layers whose weights a recorded step casts together."""
        return casts.layers(self.model)

    @cached_property
    def average(self) -> WeightAverage | None:
        return None if self.ema is None else WeightAverage(self.ema, self.model)

    @cached_property
    def average_share(self) -> Tensor | None:
        """The share of the next weights in the average, on the device, for recorded updates of a run with an
        average.
        """
        if self.graphs is None or self.average is None or self.average.coarse:
            return None
        return torch.zeros((), device=self.runtime.device)

    @cached_property
    def statistics(self) -> list[Tensor]:
        """The buffers that are averaged over the ranks in every step."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @cached_property
    def trunk_live(self) -> Tensor | None:
        """0 while trunks are frozen, else 1, on the device, for recorded updates of a run that freezes trunks."""
        if self.graphs is None or not any(phase.trunk_is_frozen(0) for phase in self.plan):
            return None
        return torch.ones((), device=self.runtime.device)

    @cached_property
    def norms(self) -> list[_BatchNorm]:
        """The BN layers that count batches but do not need the count in training; SyncBatchNorm needs it."""
        norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm))
        norms = (norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm))
        return [norm for norm in norms if norm.num_batches_tracked is not None and norm.momentum is not None]

    @property
    def out_of_patience(self) -> bool:
        """Return whether the run ends early because too many epochs brought no improvement."""
        return self.patience is not None and self.progress.since_best >= self.patience

    @property
    def called(self) -> nn.Module:
        """The network as training calls it."""
        return self.model if self.wrapped is None else self.wrapped

    @property
    def scored(self) -> nn.Module:
        """The network whose accuracy counts and that is saved."""
        return self.ema.module if self.ema else self.model


def _numbers(rates: list[Tensor]) -> list[float]:
    found: list[float] = torch.stack(rates).tolist() if rates else []
    return found
