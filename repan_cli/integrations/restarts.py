"""Restart blocks at given epochs of any training loop: the common part of the callbacks for other loops.

The restarts and the attach rate are pure functions of the epoch, so a resumed loop gives the same result as without the
stop. The loop's own random generators are not used.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, IterableDataset

from repan_cli.anneal.restart import CHOICES, RestartReport, restart
from repan_cli.blocks import rep_blocks, set_attach_rate
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.copies import unwrapped
from repan_cli.system.images import ImagesLike, first_batch, image_batches
from repan_cli.system.ranks import average_buffers, joined
from repan_cli.system.seeding import generator_for
from repan_cli.training.optim import carry_momentum, zero_momentum

MOMENTUM = ("carry", "zero")
USUAL_BATCH = 128
"""The number of images at once, for loaders that do not tell their batch size."""


@dataclass(frozen=True)
class Restarted:
    """The result of a restart: the epoch before which it happened, its blocks, and the change of the logits in eval
    mode.
    """

    epoch: int
    blocks: int
    logit_error: float


@dataclass(frozen=True)
class Restarts:
    """Merge and regrow the blocks of a network before some epochs.

    Args:
        epochs: the epochs, counted from 0, before which blocks restart; 0 is for networks that are trained already.
        rule: the restoration rule, as for `repan_cli.restart`.
        attach: how fresh branches start, as for `repan_cli.restart`.
        branch_init: the weights of the fresh branches, as for `repan_cli.restart`.
        trunk_scale: the scale of the trunk's weights, as for `repan_cli.restart`.
        attach_epochs: with `attach="ramp"`, the number of epochs in which the attach rate grows from 0 to 1.
        momentum: the optimizer's state after a restart: `carry` converts it for the merged trunks, `zero` zeroes it.
        calibration_images: the number of training images, over all processes, that `calibrate` measures on.
        seed: determines the fresh branches and the choice of those images.
        network: the name of the module that takes images and holds the blocks; by default the model itself.
    """

    epochs: tuple[int, ...]
    rule: str = "calibrate"
    attach: str = "zero-gamma"
    attach_epochs: float = 5.0
    branch_init: str = "kaiming"
    trunk_scale: str = "pace"
    momentum: str = "carry"
    calibration_images: int = 1000
    seed: int = 0
    network: str = ""

    def __post_init__(self) -> None:
        chosen = {name: getattr(self, name) for name in CHOICES} | {"momentum": self.momentum}
        for name, value in chosen.items():
            choices = {**CHOICES, "momentum": MOMENTUM}[name]
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise InputError(f"{name}={value!r} is not a choice{hint or ''}: {', '.join(choices)}")
        if not self.epochs or any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in self.epochs):
            raise InputError(f"epochs={self.epochs!r}: give the epochs, counted from 0, before which blocks restart")
        if self.calibration_images < 2 or self.attach_epochs < 0:
            raise InputError("calibration_images must be at least 2, and attach_epochs at least 0")

    def network_in(self, model: nn.Module) -> nn.Module:
        """Return the network with blocks inside a loop's model. Raises InputError if there is none."""
        model = unwrapped(model)
        try:
            found = model.get_submodule(self.network)
        except AttributeError:
            inside = [name for name, _ in model.named_modules() if name]
            hint = did_you_mean(self.network, inside)
            raise InputError(f"network='{self.network}': the model has no such module{hint}") from None
        if not any(rep_blocks(found)):
            raise InputError("the network has no block to restart: call repan_cli.expand on it before the loop begins")
        return found

    def before_epoch(
        self,
        epoch: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loader: Any,
    ) -> Restarted | None:
        """Restart the blocks of a model if a restart is due before this epoch; return None if not.

        `loader` gives the training batches: a DataLoader, or any iterable of batches.
        """
        if epoch not in self.epochs:
            return None
        network = self.network_in(model)
        number = sorted(set(self.epochs)).index(epoch) + 1
        modes = {module: module.training for module in network.modules()}
        with generators_kept(), torch.no_grad():  # BN statistics may differ between processes
            average_buffers([buffer for buffer in network.buffers() if buffer.is_floating_point()])
            images = list(self._images(loader, number))
            probe = first_batch(images).to(next(network.parameters()).device)
            before = _logits(network, probe)
            report = self._restart(network, images, number)
            after = _logits(network, probe)
        for module, mode in modes.items():
            module.training = mode
        for optimizer in map(_inner, optimizers):
            if self.momentum == "carry":
                carry_momentum(optimizer, report.changes)
            else:
                zero_momentum(optimizer)
        return Restarted(epoch, report.blocks, ((after - before).abs().max() / before.abs().max()).item())

    def _restart(self, network: nn.Module, images: list[Tensor], number: int) -> RestartReport:
        return restart(
            network,
            rule=self.rule,
            images=images,
            attach=self.attach,
            branch_init=self.branch_init,
            trunk_scale=self.trunk_scale,
            generator=generator_for("branches", self.seed, number),
        )

    def before_step(self, elapsed: float, model: nn.Module) -> None:
        """Set the attach rate `elapsed` epochs after the loop began, if it ramps."""
        begun = [epoch for epoch in self.epochs if epoch <= elapsed]
        if self.attach == "ramp" and begun:
            rate = min(1.0, (elapsed - max(begun)) / self.attach_epochs) if self.attach_epochs else 1.0
            set_attach_rate(self.network_in(model), rate)

    def _images(self, loader: Any, number: int) -> Iterator[Tensor]:
        """Yield this rank's share of the calibration images."""
        rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if joined() else (0, 1)
        left = -(-self.calibration_images // ranks)
        for batch in image_batches(_batches(loader, left, self.seed, number, rank, ranks)):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return


def _batches(loader: Any, count: int, seed: int, number: int, rank: int, ranks: int) -> ImagesLike:
    """Return batches of training images, drawn by a seed, without advancing the loader's own iterators.

    Data without length and order are read from their beginning.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return loader if isinstance(loader, Iterable) else ()
    order = torch.randperm(len(dataset), generator=generator_for("calibration", seed, number)).tolist()
    mine = order[rank::ranks][:count]
    size = getattr(loader, "batch_size", None) or USUAL_BATCH
    return DataLoader(dataset, batch_size=size, sampler=mine, collate_fn=getattr(loader, "collate_fn", None))


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the first tensor that a network returns in eval mode."""
    found = network.eval()(images)
    while not isinstance(found, Tensor):
        found = found["logits"] if hasattr(found, "keys") and "logits" in found else next(iter(_parts(found)))
    return found


def _parts(found: Any) -> Iterable[Any]:
    return found.values() if hasattr(found, "values") else found


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside the wrappers of Lightning and Accelerate, which holds the state."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the generators of PyTorch, NumPy and Python as they were."""
    numbers, python = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)
