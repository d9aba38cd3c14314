"""Make the task of each phase of a run, with its teacher found, checked and merged."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from repan_cli import checkpoint, config, export, models
from repan_cli.checkpoint.format import Checkpoint, digest_of, weights_of
from repan_cli.config.conventions import LARGE_IMAGE, WEIGHT_ENDINGS
from repan_cli.data.batches import Loader
from repan_cli.data.types import Dataset
from repan_cli.errors import InputError
from repan_cli.export.fuse import check_finite
from repan_cli.models.inspect import wanted_images
from repan_cli.models.probe import noise
from repan_cli.session import hub_folder
from repan_cli.session.agreement import file_of_first_rank
from repan_cli.session.same_data import check_classes, is_split_otherwise
from repan_cli.system.device import Runtime
from repan_cli.system.notices import warn
from repan_cli.system.user_code import names_a_file
from repan_cli.training.evaluation import eval_batch
from repan_cli.training.plan import Phase
from repan_cli.training.tasks import Classification, Distillation, Task
from repan_cli.training.teacher import LogitCache, Teacher, View, allocate


@dataclass(frozen=True)
class TeacherModel:
    """A teacher's network on the CPU, with the preprocessing of its images."""

    model: nn.Module
    view: View
    digest: str
    name: str = ""

    def describe(self) -> str:
        """Return the name of the network and the images that it sees."""
        mean, std = ("/".join(f"{value:.3g}" for value in values) for values in (self.view.mean, self.view.std))
        return f"{self.name} on {self.view.size}x{self.view.size} images, mean {mean}, std {std}"


class PhaseTasks:
    """The tasks of the phases of a run.

    A teacher is built once, with one cache of its logits for all its phases. The teacher `previous` is the merged
    network that the previous cycle ended with.

    `model` is the network that is scored. `folder` is the run's folder; a cache that does not fit in memory is put
    there. A run that was `resumed_in` the middle of a cycle finds the network of the previous cycle in that folder.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, train: Loader, machine: Runtime) -> None:
        self.model, self.dataset, self.train, self.machine = model, dataset, train, machine
        self.folder: Path | None = None
        self.resumed_in: int | None = None
        self.digests: dict[str, str] = {}
        self.described: dict[str, str] = {}
        self._teachers: dict[config.TeacherConfig, LogitCache | Teacher] = {}

    def prepare(self, plan: Sequence[Phase]) -> None:
        """Find the teachers of all phases, so that errors appear before the first step."""
        for phase in plan:
            if phase.teacher.name not in (None, config.PREVIOUS):
                self._teacher(phase.teacher)

    def __call__(self, phase: Phase) -> Task:
        hard = Classification(phase.optim.label_smoothing, phase.optim.loss == "bce")
        settings = phase.teacher
        if settings.name is None:
            return hard
        return Distillation(hard, self._teacher(settings, phase.cycle), settings.alpha, settings.temperature)

    def _teacher(self, settings: config.TeacherConfig, cycle: int = 0) -> LogitCache | Teacher:
        name = _name_in(settings)
        settings = dataclasses.replace(settings, alpha=0.5, temperature=1.0)  # its logits do not depend on these
        if name == config.PREVIOUS:
            self._teachers.pop(settings, None)
        if settings not in self._teachers:
            found = self._previous(cycle) if name == config.PREVIOUS else find_teacher(settings, self.dataset)
            self.digests[name] = found.digest
            self.described[name] = found.describe()
            self._teachers[settings] = self._ready(found, settings)
        return self._teachers[settings]

    def _previous(self, cycle: int) -> TeacherModel:
        """Return the network of the previous cycle; from its file if the network has changed since."""
        model = copy.deepcopy(self.model).cpu().float()
        if cycle == self.resumed_in:
            assert self.folder is not None, "a run that was resumed has a folder"
            file = self.folder / f"cycle_{cycle - 1:02d}.pt"
            with file_of_first_rank(file, self.machine.rank) as here:
                checkpoint.load_weights(model, checkpoint.load(here).weights, str(file))
        return TeacherModel(model, self._student, digest_of(weights_of(model)))

    @property
    def _student(self) -> View:
        return View(self.dataset.image_size, self.dataset.mean, self.dataset.std)

    def _ready(self, found: TeacherModel, settings: config.TeacherConfig) -> LogitCache | Teacher:
        model = self.machine.place(merged(found, self.dataset.channels))
        teacher = Teacher(model, own=found.view, student=self._student, runtime=self.machine)
        if settings.cache == "none":
            return teacher
        if why := self.train.unnumbered:
            if settings.cache == "views":
                raise InputError(f"teacher.cache=views has no use: with {why} no view repeats; set teacher.cache=none")
            return teacher
        shape = (self.train.count, self.train.view_count, len(self.dataset.classes))
        return LogitCache(
            teacher,
            lambda: allocate(shape, self.machine.device, _there(self.folder)),
            together=eval_batch(self.train) if self.machine.device.type == "cuda" else 1,
        )


def _there(folder: Path | None) -> Path:
    """Return the run's folder if this machine sees it, otherwise the folder for temporary files."""
    return folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())


def merged(found: TeacherModel, channels: int) -> nn.Module:
    """Return a teacher's network with its blocks merged and its BN folded, if it has any."""
    images = noise(2, channels, found.view.size, found.view.size)
    try:
        return export.fuse(found.model, images)[0]
    except InputError:  # nothing to merge
        return found.model.eval()


def _name_in(settings: config.TeacherConfig) -> str:
    assert settings.name is not None, "only phases that name a teacher ask for one"
    return settings.name


def find_teacher(settings: config.TeacherConfig, dataset: Dataset) -> TeacherModel:
    """Find the network that `teacher.name` means.

    Raises InputError if there is none, if it does not have exactly the classes of the data, or if it reads other
    channels.
    """
    name = hub_folder.file_of(_name_in(settings))
    weights = checkpoint.load_any(name) if checkpoint.split_key(name)[0].exists() else None
    if weights is None:
        found = _pretrained(name, dataset)
    elif isinstance(weights, Checkpoint):
        found = _ours(name, settings, dataset, weights)
    else:
        found = _theirs(name, settings, dataset, weights)
    check_finite(found.model)
    size = settings.image_size or found.view.size
    return TeacherModel(found.model, View(size, found.view.mean, found.view.std), found.digest, found.name)


def _ours(name: str, settings: config.TeacherConfig, dataset: Dataset, saved: Checkpoint) -> TeacherModel:
    card = saved.card
    if names_a_file(card.model) and settings.model is None:
        raise InputError(
            f"the teacher {name} holds a network of your own, {card.model}: give teacher.model={card.model} (files "
            "are not imported automatically)"
        )
    check_classes(f"the teacher {name}", card.classes, dataset)
    if card.in_chans != dataset.channels:
        raise InputError(f"the teacher {name} reads {card.in_chans} channels, {dataset.name} has {dataset.channels}")
    if is_split_otherwise(card, dataset):
        warn(
            f"the teacher {name} was trained with another validation part: some of its training images are now held out"
        )
    model = models.rebuild(saved, name, settings.model)
    return TeacherModel(model, View(card.image_size, card.mean, card.std), saved.digest(), card.model)


def _theirs(name: str, settings: config.TeacherConfig, dataset: Dataset, weights: Mapping[str, Tensor]) -> TeacherModel:
    told = hub_folder.described(checkpoint.split_key(name)[0])
    if settings.model is None and told is None:
        raise InputError(f"{name} does not name its network: give teacher.model=NAME")
    images = told.images if told is not None else {}
    if told is not None and told.classes is not None:
        check_classes(f"the teacher {name}", told.classes, dataset)
    size = settings.image_size or images.get("input_size", (dataset.image_size,))[-1]
    full = told.network if settings.model is None and told is not None else models.resolve(settings.model or "", size)
    mean, std = (tuple(images.get(key, usual)) for key, usual in (("mean", dataset.mean), ("std", dataset.std)))
    model = models.create(full, num_classes=len(dataset.classes), in_chans=dataset.channels)
    models.load_foreign(model, weights, f"the teacher {name}")
    return TeacherModel(model, View(size, mean, std), digest_of(weights_of(model)), full)


def _pretrained(name: str, dataset: Dataset) -> TeacherModel:
    if Path(name).suffix in WEIGHT_ENDINGS:
        raise InputError(f"no file {name} for the teacher: give its location with --teacher")
    full = models.resolve(name, LARGE_IMAGE)  # short names are timm's own networks, made for large images
    if models.has_new_classifier(full, len(dataset.classes)):
        raise InputError(
            f"the pretrained {full} does not know the {len(dataset.classes)} classes of {dataset.name}: train it on "
            "them first, then give its checkpoint"
        )
    model = models.create(full, num_classes=len(dataset.classes), in_chans=dataset.channels, pretrained=True)
    wanted = wanted_images(model)
    view = View(wanted["input_size"][-1], tuple(wanted["mean"]), tuple(wanted["std"]))
    return TeacherModel(model, view, digest_of(weights_of(model)), full)
