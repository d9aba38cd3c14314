"""Build the objects of a run from a configuration, without writing anything.

The order of initialization:

1. check that the run directory is free and the trackers are available
2. device and precision
3. data, with its validation part
4. network, initial weights, blocks
5. plan, task, optimizer

Only then does `runner.begin` create the run directory.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import repan_cli
from repan_cli import models, runs
from repan_cli.checkpoint.card import ModelCard
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.resolve import Resolved, refuse
from repan_cli.config.settings import AUTO_BATCH, Config, EmaConfig, flatten, replace
from repan_cli.data import datasets
from repan_cli.data.batches import Loader
from repan_cli.data.build import eval_loader, train_loader
from repan_cli.data.types import Dataset
from repan_cli.errors import InputError
from repan_cli.models import user_file
from repan_cli.runs import trackers
from repan_cli.session import batch_size, places
from repan_cli.session.agreement import agree_on_images, agree_on_network, agree_on_position, agree_on_settings
from repan_cli.session.network import (
    Network,
    build,
    noise,
    read_weights,
    resolve_names,
    restarted,
    restore_network,
    safe_precision,
    state_of,
    wanted_size,
)
from repan_cli.session.teachers import PhaseTasks
from repan_cli.system.device import Runtime, start_runtime, use_threads
from repan_cli.system.launcher import own_rank
from repan_cli.system.notices import doing, warn, warn_once
from repan_cli.system.ranks import first_on_each_machine
from repan_cli.system.text import count, quoted
from repan_cli.system.user_code import names_a_file, own_code_options
from repan_cli.training.cuda_graphs import CudaRecorder, Graphs
from repan_cli.training.evaluation import Score, eval_batch, evaluate
from repan_cli.training.optim import build_optimizer, can_be_recorded
from repan_cli.training.plan import Phase, cycle_plan, training_plan
from repan_cli.training.run import Training
from repan_cli.training.schedules import SCHEDULES
from repan_cli.training.snapshot import restore

FEW_TO_CHOOSE, FRACTION_OF_FEW = 50, 0.3
"""The number of validation images below which chance chooses the epoch, and the fraction to hold out then."""

LEFT_OUT, MOST_LEFT_OUT = "left_out", 10_000
"""The key under which a run notes the images that it began without, and how many it notes at most."""


@dataclass(frozen=True)
class Session:
    """A run that is ready to start.

    `config` has the full names of network and block family. `start` is the score of the initial weights, for a run that
    needs no baseline.
    """

    command: str
    config: Config
    dataset: Dataset
    network: Network
    training: Training
    start: dict[str, Any] | None

    @property
    def user_model(self) -> str | None:
        """Return the name `file.py:function` of a user-defined network; its checkpoints cannot be read without it."""
        return self.network.name if user_file.names_a_file(self.network.name) else None

    @property
    def own_code(self) -> str:
        """Return the options that name a user-defined network and blocks; the run's checkpoints cannot be read without
        them.
        """
        family = self.network.expansion.family
        block = f" --block {quoted(family)}" if names_a_file(family) else ""
        return (f" --model {quoted(self.user_model)}" if self.user_model else "") + block

    @property
    def own_code_again(self) -> str:
        """Return the command-line arguments that name the user's own code again when the run is resumed."""
        family = self.network.expansion.family
        return own_code_options({**flatten(self.config), "model.name": self.network.name, "block.name": family})

    @property
    def names(self) -> tuple[str, str, str]:
        """Return the full names of the network and its block family, and the name of the data set."""
        return self.network.name, self.network.expansion.family, self.dataset.name

    def card(self, *, cycle: int, epoch: int | None, metrics: Mapping[str, Any]) -> ModelCard:
        """Describe the network for a checkpoint at this point of the run."""
        network, data = self.network, self.dataset
        return ModelCard(
            model=network.name,
            block=network.expansion.family,
            form=models.form_of(self.training.model),
            structure=network.expansion.structure(network.native),
            classes=tuple(data.classes),
            in_chans=data.channels,
            image_size=data.image_size,
            mean=tuple(data.mean),
            std=tuple(data.std),
            config=flatten(self.config, cycles=self.command == "cycle"),
            split_digest=data.split_digest,
            cycle=cycle,
            epoch=epoch,
            metrics=metrics,
            repan=repan_cli.__version__,
            command=self.command,
            labels_digest=data.labels_digest,
            names_digests=data.names_digests or None,
            surroundings={**surroundings(self.training.runtime), **places.noted(self.config)},
            teachers=dict(self.training.task_of.digests),
        )


def prepare(
    command: str, resolved: Resolved, *, saved: Checkpoint | None = None, folder: Path | None = None
) -> Session:
    """Build everything that a run needs, without writing anything.

    A resumed run gets the state that was `saved` in its `folder`. Raises InputError for anything that cannot be used.
    """
    config = resolved.config
    if own_rank() == 0:
        if saved is None:
            runs.check_free(config.run.out)
        trackers.check(config.run.trackers)
    run = config.run
    machine = start_runtime(run.device, run.precision, channels_last=run.channels_last, deterministic=run.deterministic)
    if machine.device.type == "cpu" and machine.ranks == 1:  # a launcher gives each rank its threads
        before = saved.card.surroundings or {} if saved else {}
        config = replace(config, {"run.threads": use_threads(config.run.threads or before.get("threads"))})
    if AUTO_BATCH != config.data.batch_size < 2 * machine.ranks:
        raise InputError(
            f"data.batch_size={config.data.batch_size} is too small for {machine.ranks} processes: each needs two "
            "images, as BN cannot train on one"
        )
    agree_on_settings(config)
    with doing(f"reading the weights {config.model.init}"):
        weights = read_weights(config) if saved is None else None
    size = wanted_size(config, weights) if saved is None else saved.card.image_size
    with doing(f"reading the data set {config.data.name}"):
        dataset = first_on_each_machine(lambda: load_dataset(config, size, saved))
        agree_on_images(dataset)
    with doing(f"building the network {config.model.name or ''}"):
        network = build(command, config, dataset, weights) if saved is None else restore_network(config, dataset, saved)
    if network.finished:
        refuse(resolved.given, ("baseline.",), "has no effect here: the weights that were given are the baseline")
    machine = safe_precision(machine, network, dataset, chosen=config.run.precision)
    if config.run.sync_bn:
        network = _with_shared_statistics(network, dataset, machine)
    machine.place(network.model)
    config = batch_size.resolved(resolve_names(config, network), network.model, dataset, machine)
    agree_on_network(network.model, config.model.name or "")
    training = _training(command, config, dataset, network, machine)
    if saved is not None:
        state = state_of(saved, "the run")
        restore(training, saved.state, state.progress)
        training.task_of.folder = folder
        if training.progress.begun:
            training.task_of.resumed_in = training.plan[training.progress.phase].cycle
        start = state.begun["summary"]["baseline"] if network.finished else None
    agree_on_position(training)
    if saved is None:
        _warn_of_few_to_choose(config.data.val_fraction, dataset)
        start = _score_start(training) if network.finished else None
    return Session(command, config, dataset, network, training, start)


def surroundings(machine: Runtime) -> dict[str, Any]:
    """Return what the last bits of a run may depend on, besides its settings."""
    return {
        "torch": str(torch.__version__),
        "device": machine.device.type,
        "threads": torch.get_num_threads(),
        "processes": machine.ranks,
        "precision": machine.precision,
    }


def load_dataset(config: Config, network_size: int | None, saved: Checkpoint | None = None) -> Dataset:
    """Read the data of a run. Image folders without a common size get that of the network.

    A resumed run with `data.on_error=skip` keeps the positions of the images that it began with.
    """
    arguments = {**datasets.settings_of(config.data), "network_size": network_size}
    if saved is not None:
        arguments["known_split"] = saved.card.split_digest
        if config.data.on_error == "skip" and (known := _left_out(saved)) is not None:
            return datasets.load(**arguments, left_out=known)
    data = datasets.load(**arguments)
    if saved is None or config.data.on_error == "stop" or data.labels_digest == saved.card.labels_digest:
        return data
    return datasets.load(**arguments, left_out=())


def _left_out(saved: Checkpoint) -> tuple[str, ...] | None:
    """Return the images that a run began without; None if it did not record them, as in older versions."""
    names = saved.card.run.begun.get(LEFT_OUT) if saved.card.run is not None else None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _warn_of_few_to_choose(fraction: float, data: Dataset) -> None:
    """Warn if the validation part is so small that chance decides which epoch is best."""
    if data.val is None or len(data.val.labels) >= FEW_TO_CHOOSE:
        return
    drawn = data.split_digest and fraction < FRACTION_OF_FEW
    mend = f"set data.val_fraction={FRACTION_OF_FEW}" if drawn else "more images help"
    held = count(len(data.val.labels), "validation image")
    warn_once(f"the best epoch is chosen on only {held}, so it is partly chance: {mend}")


def _training(command: str, config: Config, dataset: Dataset, network: Network, machine: Runtime) -> Training:
    plan = cycle_plan(config, baseline=not network.finished) if command == "cycle" else training_plan(config)
    _warn_of_a_short_cycle(plan[-1])
    if plan[-1].start_from == "best-test":
        warn("cycle.start_from=best-test: the test set chooses the epochs, so the test results are too good")
    for phase in plan:
        SCHEDULES[phase.optim.schedule]  # an unknown schedule is an error before the first step
    train = train_loader(dataset, config.data, machine)
    ema = _average(network.model, config.ema)
    task_of = PhaseTasks(ema.module if ema else network.model, dataset, train, machine)
    with doing("preparing the teacher"):
        task_of.prepare(plan)
    if not train.steps(config.data.batch_size):
        raise InputError(
            f"{train.count} training images do not give each of {machine.ranks} processes two, as BN needs: start fewer"
        )
    if config.data.batch_size > train.count:
        batch = config.data.batch_size
        warn(f"data.batch_size={batch} is more than the {train.count:,} training images: an epoch is one step")
    optimizer = build_optimizer(network.model, config.optim)
    val = eval_loader(dataset, "val", machine, config.data.workers) if dataset.val else None
    test = eval_loader(dataset, "test", machine, config.data.workers)
    train.check_room(config.data.batch_size)
    for images in filter(None, (val, test)):
        images.check_room(eval_batch(images) * images.ranks)
    return Training(
        model=network.model,
        task_of=task_of,
        optimizer=optimizer,
        plan=plan,
        train=train,
        val=val,
        test=test,
        runtime=machine,
        batch_size=config.data.batch_size,
        restarted=restarted(config, network.model) if command == "cycle" else None,
        seed=config.run.seed,
        log_every=config.run.log_every,
        patience=config.run.patience,
        accumulate=config.optim.accumulate,
        wrapped=_wrapped(network.model, config, machine),
        ema=ema,
        scaler=machine.scaler(),
        graphs=_graphs(config, machine, optimizer),
    )


def _wrapped(model: nn.Module, config: Config, machine: Runtime) -> nn.Module | None:
    """Return the network as training calls it; None if that is the network itself.

    With several ranks the result exchanges gradients. With `run.compile` it is compiled.
    """
    wrapped = model
    if machine.ranks > 1:
        own = [machine.device] if machine.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # older PyTorch does not know its new name
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=own, broadcast_buffers=False)
    if config.run.compile == "on":
        compiled = torch.compile(wrapped, dynamic=False)  # an epoch has batches of two sizes
        assert isinstance(compiled, nn.Module), "PyTorch compiles a module into a module"
        wrapped = compiled
    return None if wrapped is model else wrapped


def _graphs(config: Config, machine: Runtime, optimizer: torch.optim.Optimizer) -> Graphs | None:
    """Return the object that records updates as CUDA graphs; None if updates are not recorded.

    Raises InputError if `run.graph=on` asks for a recording that is not possible.
    """
    reasons = {
        f"the device is {machine.device.type}": machine.device.type != "cuda",
        "there are several processes": machine.ranks > 1,
        f"optim.name={config.optim.name} decides on the host": not can_be_recorded(optimizer),
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if config.run.graph == "on" and why:
        raise InputError(f"run.graph=on, but {why}: set run.graph=auto")
    if config.run.graph == "off" or why:
        return None
    return Graphs(CudaRecorder(machine.device), demanded=config.run.graph == "on")


def _with_shared_statistics(network: Network, dataset: Dataset, machine: Runtime) -> Network:
    """Give the network BN over the batches of all ranks; its weights, names and merged form stay the same."""
    if machine.device.type != "cuda" or machine.ranks == 1:
        raise InputError("run.sync_bn is for several GPUs under torchrun: set run.sync_bn=false")
    return dataclasses.replace(network, model=share_statistics(network.model, noise(dataset)))


@torch.no_grad()
def share_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the network with BN over all ranks, converted by timm, which keeps the activations inside timm's BN
    layers.

    Raises InputError if the result computes something else of `images` in eval mode.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    before = model.eval()(images)
    shared: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call] # timm's
    after = shared.eval()(images)
    for name, module in shared.named_modules():
        module.training = modes.get(name, True)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5 * before.abs().max().item()):
        raise InputError("synchronized BN would change the function of this network: set run.sync_bn=false")
    return shared


def _average(model: nn.Module, ema: EmaConfig) -> ModelEmaV3 | None:
    """Make the weight average if the settings ask for one.

    Its decay grows from 0, since the first weights soon become old.
    """
    return ModelEmaV3(model, decay=ema.decay, use_warmup=True) if ema.enabled else None


def _warn_of_a_short_cycle(last: Phase) -> None:
    settings, reached = last.settings, last.attach_rate(last.epochs)
    if settings is not None and reached is not None and reached < 1:
        longer = f"cycle.attach_epochs={settings.attach_epochs:g} is longer than a cycle"
        warn(f"{longer}: branches reach the attach rate {reached:.2f}, not 1")
    elif settings is not None and settings.freeze_trunk and settings.attach_epochs >= last.epochs:
        warn(
            f"cycle.freeze_trunk keeps the trunk fixed for the whole of each cycle, as cycle.attach_epochs="
            f"{settings.attach_epochs:g} is not shorter than a cycle"
        )


def _score_start(training: Training) -> dict[str, Any]:
    def score(images: Loader) -> Score:
        return evaluate(training.model, images)

    with doing("scoring the initial weights"):
        return _scored(training, score)


def _scored(training: Training, score: Callable[[Loader], Score]) -> dict[str, Any]:
    top1 = score(training.val).top1 if training.val else None
    return {"top1": top1, "test_top1": score(training.test).top1, "seconds": 0.0}
