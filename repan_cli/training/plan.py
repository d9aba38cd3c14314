"""Plan a run: its phases, with learning rate and attach rate as pure functions of position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from repan_cli.config.settings import Config, CycleConfig, OptimConfig, TeacherConfig, baseline_phase
from repan_cli.training.schedules import learning_rate


@dataclass(frozen=True)
class Phase:
    """A part of a run: the baseline (cycle 0, no restart) or one annealing cycle.

    `schedule_start` and `schedule_length` place the phase, in epochs, within its learning-rate schedule. `start_from`
    says which of its weights the next phase starts from; see `cycle.start_from`.
    """

    cycle: int
    epochs: int
    optim: OptimConfig
    settings: CycleConfig | None
    schedule_start: float
    schedule_length: float
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    start_from: str = "last"

    def learning_rate(self, elapsed: float) -> float:
        """Return the learning rate `elapsed` epochs into this phase."""
        return learning_rate(self.optim, self.schedule_start + elapsed, self.schedule_length)

    @property
    def restart(self) -> CycleConfig | None:
        """Return the settings of the restart before this phase; None for the baseline and for controls."""
        return self.settings if self.settings is not None and self.settings.restart == "repan" else None

    @property
    def restarts(self) -> bool:
        """Return whether blocks are merged and regrown before this phase."""
        return self.restart is not None

    @property
    def rescales(self) -> bool:
        """Return whether trunks are rescaled before this phase, as a control for restarts."""
        return self.settings is not None and self.settings.restart == "rescale"

    @property
    def carries_momentum(self) -> bool:
        """Return whether the optimizer's state is carried into this phase."""
        return self.settings is not None and self.settings.momentum == "carry" and not self.rescales

    def attach_rate(self, elapsed: float) -> float | None:
        """Return the attach rate `elapsed` epochs into this phase; None if it does not change."""
        if self.restart is None or self.restart.attach != "ramp":
            return None
        return min(1.0, elapsed / self.restart.attach_epochs) if self.restart.attach_epochs else 1.0

    def trunk_is_frozen(self, elapsed: float) -> bool:
        """Return whether the trunk stays fixed `elapsed` epochs into this phase."""
        restart = self.restart
        return restart is not None and restart.freeze_trunk and elapsed < restart.attach_epochs

    def data_cycle(self) -> int:
        """Return the cycle whose data order this phase uses."""
        return min(self.cycle, 1) if self.settings and self.settings.reseed == "same" else self.cycle


def training_plan(config: Config) -> tuple[Phase, ...]:
    """Return the single phase of `train` and `distill`."""
    return (Phase(0, config.epochs, config.optim, None, 0, config.epochs, config.teacher),)


def cycle_plan(config: Config, *, baseline: bool) -> tuple[Phase, ...]:
    """Return the phases of `cycle`: the annealing cycles and, unless the run starts from a trained network, the
    baseline.
    """
    start = baseline_phase(config)
    lengths = ([start.epochs] if baseline else []) + [config.epochs] * config.cycle.count
    return tuple(_phases(config, start, lengths, first=0 if baseline else 1))


def _phases(config: Config, baseline: Config, lengths: list[int], *, first: int) -> Iterator[Phase]:
    done = 0
    for cycle, epochs in enumerate(lengths, start=first):
        optim = _decayed(config.optim, config.cycle.lr_decay ** (cycle - 1)) if cycle else baseline.optim
        schedule = (0, epochs)
        if config.cycle.schedule == "continuous":
            schedule = (done, sum(lengths))
            optim = _with_schedule_of(optim, baseline.optim if first == 0 else config.optim)
        teacher = config.teacher if cycle else baseline.teacher
        settings = config.cycle if cycle else None
        yield Phase(cycle, epochs, optim, settings, *schedule, teacher, config.cycle.start_from)
        done += epochs


def _decayed(optim: OptimConfig, factor: float) -> OptimConfig:
    return dataclasses.replace(optim, lr=max(optim.lr * factor, optim.min_lr))


def _with_schedule_of(optim: OptimConfig, source: OptimConfig) -> OptimConfig:
    """Return `optim` with the learning-rate settings of `source`."""
    same = {name: getattr(source, name) for name in ("lr", "min_lr", "schedule", "warmup_epochs")}
    return dataclasses.replace(optim, **same)
