"""From a configuration to the objects of a run, without writing anything.

Order of initialisation:
1. the run directory is checked to be free
2. device and precision
3. data, with its validation part
4. network, and weights to start from
5. plan, task, optimizer
Only then does `train` create the run directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import repan_cli
from repan_cli import anneal, checkpoint, engine, models, runs, runtime
from repan_cli.blocks import rep_blocks
from repan_cli.config import Config, Resolved, flatten, replace
from repan_cli.console import warn
from repan_cli.data import datasets
from repan_cli.data.datasets import Dataset, Images
from repan_cli.data.resident import ResidentImages
from repan_cli.errors import InputError
from repan_cli.optim import SCHEDULES, build_optimizer
from repan_cli.tasks import Classification


@dataclass(frozen=True)
class Session:
    """A run that is ready to go.

    `config` has the network's full name; `start` is the score of the weights it begins with, if they were given.
    """

    command: str
    config: Config
    dataset: Dataset
    training: engine.Training
    start: dict[str, Any] | None

    def meta(self, **position: Any) -> dict[str, Any]:
        """The description that its checkpoints carry."""
        return {
            "repan": repan_cli.__version__,
            "command": self.command,
            "model": self.config.model.name,
            "block": self.config.block.name,
            "form": models.form_of(self.training.model),
            "classes": list(self.dataset.classes),
            "in_chans": self.dataset.channels,
            "image_size": self.dataset.image_size,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "split_digest": self.dataset.split_digest,
            "config": flatten(self.config, cycles=self.command == "cycle"),
            **position,
        }


def prepare(command: str, resolved: Resolved) -> Session:
    """Build everything that a run needs, without writing anything. Raises InputError for what cannot be used."""
    config = resolved.config
    runs.check_free(config.run.out)
    machine = runtime.start(config.run.device, config.run.precision, channels_last=config.run.channels_last)
    dataset = load_dataset(config)
    initial = checkpoint.load(config.model.init) if config.model.init else None
    config = _name_network(config, dataset, initial)
    torch.manual_seed(runtime.key("weights", config.run.seed))
    model = models.create(
        config.model.name, block=config.block.name, num_classes=len(dataset.classes), in_chans=dataset.channels
    )
    if initial:
        _check_origin(config, dataset, initial)
        checkpoint.load_weights(model, initial, config.model.init)
    if command == "cycle" and not any(rep_blocks(model)):
        raise InputError(f"{config.model.name} has no re-parameterizable blocks to cycle; see 'repan list models'")
    model.to(machine.device, memory_format=machine.memory_format)
    training = _training(command, config, dataset, model, machine)
    start = _score_start(training) if initial else None
    return Session(command, config, dataset, training, start)


def load_dataset(config: Config) -> Dataset:
    data = config.data
    return datasets.load(
        data.name, data.root, image_size=data.image_size, val_fraction=data.val_fraction, split_seed=data.split_seed
    )


def _name_network(config: Config, dataset: Dataset, initial: checkpoint.Checkpoint | None) -> Config:
    """The configuration with the full name of the network; with --init and no --model, that of the checkpoint."""
    if config.model.name is None:
        return replace(config, {"model.name": initial.meta["model"], "block.name": initial.meta["block"]})
    return replace(config, {"model.name": models.resolve(config.model.name, dataset.image_size)})


def _check_origin(config: Config, dataset: Dataset, initial: checkpoint.Checkpoint) -> None:
    """The weights to start from must be of this network and these classes, in the form that trains."""
    meta, source = initial.meta, config.model.init
    for what, found, wanted in (
        ("the network", meta["model"], config.model.name),
        ("blocks of the family", meta["block"], config.block.name),
    ):
        if found != wanted:
            raise InputError(f"{source} holds {what} {found}, not {wanted}: give --model and --block as it was trained")
    if meta["form"] == checkpoint.FUSED:
        raise InputError(
            f"{source} is fused, its branches are gone: start from last.pt, best.pt or cycle_NN.pt of its run"
        )
    check_classes(source, meta["classes"], dataset)
    if meta["split_digest"] != dataset.split_digest:
        warn(f"{source} was trained with another validation part: images it has seen are now used to choose by")


def check_classes(source: str | Path, classes: list[str], dataset: Dataset) -> None:
    """Raises InputError when a checkpoint's classes are not the data set's."""
    if classes == list(dataset.classes):
        return
    if len(classes) != len(dataset.classes):
        counts = f"{source} knows {len(classes)} classes, {dataset.name} has {len(dataset.classes)}"
        raise InputError(f"{counts}: give the data it was trained on")
    first = next((a, b) for a, b in zip(classes, dataset.classes, strict=True) if a != b)
    raise InputError(
        f"{source} and {dataset.name} name their classes differently, such as '{first[0]}' and '{first[1]}'"
    )


def _training(
    command: str, config: Config, dataset: Dataset, model: torch.nn.Module, machine: runtime.Runtime
) -> engine.Training:
    plan = (
        anneal.cycle_plan(config, baseline=config.model.init is None)
        if command == "cycle"
        else anneal.training_plan(config)
    )
    _warn_of_a_long_ramp(plan[-1])
    for phase in plan:
        SCHEDULES[phase.optim.schedule]  # an unknown one is an error before the first step
    padding, flip = 0, False
    if config.data.augment == "standard":
        padding, flip = config.data.crop_padding, dataset.flip
        padding = dataset.image_size // 8 if padding is None else padding

    def resident(part: Images, **views: Any) -> ResidentImages:
        return ResidentImages(
            part,
            mean=dataset.mean,
            std=dataset.std,
            device=machine.device,
            memory_format=machine.memory_format,
            **views,
        )

    return engine.Training(
        model=model,
        task_of=lambda phase: Classification(phase.optim.label_smoothing),
        optimizer=build_optimizer(model, config.optim),
        plan=plan,
        train=resident(dataset.train, padding=padding, flip=flip),
        val=resident(dataset.val) if dataset.val else None,
        test=resident(dataset.test),
        runtime=machine,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        log_every=config.run.log_every,
    )


def _warn_of_a_long_ramp(last: anneal.Phase) -> None:
    reached = last.attach_rate(last.epochs)
    if reached is not None and reached < 1:
        longer = f"cycle.attach_epochs={last.settings.attach_epochs:g} is longer than a cycle"
        warn(f"{longer}: branches reach rate {reached:.2f}")


def _score_start(training: engine.Training) -> dict[str, Any]:
    def score(images: ResidentImages) -> engine.Score:
        return engine.evaluate(training.model, images)

    top1 = score(training.val).top1 if training.val else None
    return {"top1": top1, "test_top1": score(training.test).top1, "seconds": 0.0}
