"""Declare every setting with its text, default and bounds: a tree of frozen dataclasses, one per section."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from repan_cli.config.conventions import SMALL_IMAGE, WEIGHT_ENDINGS
from repan_cli.config.schema import Setting, setting

RECIPES = {
    "digits": "recipes/digits",
    "folder": "recipes/folder",
    "imagenet": "recipes/imagenet",
    **dict.fromkeys(("cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "synthetic"), "recipes/cifar"),
    **dict.fromkeys(("imagenet16", "imagenet16_120", "imagenet16_150", "imagenet16_200"), "recipes/cifar"),
}
"""The recipe a data set is trained with when no `-c FILE` is given."""

AUTO_BATCH = 0
"""The value of `data.batch_size=auto`, until the device is known."""

POLICIES = ("autoaugment", "randaugment", "trivialaugment")
"""Augmentation policies that work on one picture at a time."""


@dataclass(frozen=True)
class ModelConfig:
    name: str | None = setting(
        None,
        "Network: repvgg (see 'repan list models'), timm:NAME, torchvision:NAME, or your own as file.py:function.",
        path=True,
    )
    pretrained: bool = setting(False, "Start from the pretrained weights of timm or torchvision.")
    init: str | None = setting(
        None,
        "File of weights to start from, from any program; cycle skips the baseline if the classes match.",
        path=True,
    )

    def problems(self) -> Iterator[str]:
        if self.pretrained and self.init:
            yield "model.pretrained and model.init both say which weights to start from: give one"
        name = self.name or ""
        if name.endswith(WEIGHT_ENDINGS):
            yield f"model.name={name} is a file of weights: give it as --init, and --model if repan did not write it"
        if name.endswith(".py"):
            yield f"model.name={name} does not name a function: give {name}:FUNCTION, which builds the network"


@dataclass(frozen=True)
class BlockConfig:
    name: str | None = setting(
        None,
        "Block family: a name from 'repan list blocks', or your own as file.py:function; null, the default: the "
        "network's own blocks if it has any, else repvgg.",
        path=True,
    )
    kernel: tuple[int, ...] = setting(
        (), "Kernel sizes of the convolutions that become blocks, such as [3,5]; [] means all above 1.", low=1
    )
    include: tuple[str, ...] = setting((), "Use only convolutions that match one of these globs; [] means all.")
    exclude: tuple[str, ...] = setting((), "Skip convolutions that match one of these globs.")
    limit: int | None = setting(None, "Largest number of blocks; those with the most weights come first.", low=1)
    branches: int | None = setting(None, "Number of k x k side branches (for mobileone; null means 3).", low=1)

    def problems(self) -> Iterator[str]:
        if (self.name or "").endswith(".py"):
            yield f"block.name={self.name} does not name a function: give {self.name}:FUNCTION, which returns branches"


@dataclass(frozen=True)
class DataConfig:
    name: str | None = setting(None, "Data set: see 'repan list datasets'; or a folder of class folders.", path=True)
    root: str = setting("data", "Folder of the data sets, each in ROOT/NAME; for 'folder', ROOT itself.", path=True)
    image_size: int | None = setting(
        None,
        "Side of the images in pixels; null: the data set's own; for image folders the network's, unless all images "
        "are small squares of one size.",
        low=4,
    )
    batch_size: int = setting(
        128,
        "Images per training step; auto: the largest power of two that fits the device, with at least 16 steps per "
        "epoch.",
        low=2,
        words={"auto": AUTO_BATCH},
    )
    val_fraction: float = setting(
        0.1, "Fraction of the training set held out for validation; 0 trains on everything.", low=0, high=0.9
    )
    test_fraction: float = setting(
        0.2, "Fraction of the training set held out as the test part, for image folders without one.", above=0, high=0.9
    )
    split_seed: int = setting(0, "Seed of the validation and test split, independent of run.seed.", low=0)
    class_order: str = setting(
        "text",
        "Class order of image folders: text (or a classes.txt next to the parts); natural, 2 before 10; a file with "
        "one name per line.",
        path=True,
    )
    channels: int | None = setting(None, "Read images in gray (1) or color (3); null: as in the data set.", low=1)
    classes: int | None = setting(
        None,
        "Use only this many classes, the first by name; null means all. 'synthetic' has as many, 10 by default.",
        low=2,
    )
    per_class: int | None = setting(
        None,
        "Use at most this many training images per class, the first ones; val_fraction is held out of them.",
        low=1,
    )
    augment: str = setting(
        "standard",
        "standard: random crop, and flip where that makes sense; autoaugment, randaugment or trivialaugment: the "
        "same, then a policy; none.",
        choices=("standard", *POLICIES, "none"),
    )
    crop: str = setting(
        "auto",
        "pad: images in memory are padded and cropped; resized: a part of each is cropped and resized, read one by "
        f"one; auto: pad up to {SMALL_IMAGE} pixels, else resized.",
        choices=("auto", "pad", "resized"),
    )
    crop_padding: int | None = setting(
        None, "Padding in pixels before the random crop; null means an eighth of the image's side.", low=0
    )
    crop_area: float = setting(0.08, "Smallest fraction of an image's area that crop=resized keeps.", above=0, high=1)
    cutout: int = setting(0, "Side in pixels of a square that is blanked in every training image; 0 means none.", low=0)
    erase: float = setting(0.0, "Fraction of training images in which a random rectangle is blanked.", low=0, high=1)
    mixup: float = setting(0.0, "Alpha of mixup; 0 turns it off. With cutmix, each batch uses one of the two.", low=0)
    cutmix: float = setting(0.0, "Alpha of CutMix; 0 turns it off.", low=0)
    workers: int | None = setting(
        None, "Number of processes that read images; null: with a GPU one per core, else one.", low=0
    )
    on_error: str = setting(
        "stop", "Training images that cannot be read: stop, or skip and count them.", choices=("stop", "skip")
    )

    def problems(self) -> Iterator[str]:
        if self.channels == 2 or (self.channels or 0) > 3:
            yield f"data.channels={self.channels} is neither 1 nor 3"


@dataclass(frozen=True)
class OptimConfig:
    name: str = setting("sgd", "Optimizer: sgd, or one of timm's, see 'repan list optimizers'.")
    lr: float = setting(0.1, "Peak learning rate.", above=0)
    min_lr: float = setting(0.0, "Learning rate at the end of the schedule.", low=0)
    momentum: float = setting(0.9, "Momentum, for optimizers that have it.", low=0, high=0.9999)
    nesterov: bool = setting(True, "Nesterov momentum (no effect without momentum).")
    weight_decay: float = setting(5e-4, "Weight decay.", low=0)
    decay: str = setting(
        "weights", "What decays: weights (not BN, biases, classifier), or all.", choices=("weights", "all")
    )
    clip: float | None = setting(10.0, "Norm to which larger gradients are clipped; null turns clipping off.", above=0)
    clip_params: str = setting(
        "all", "Clipped gradients: of all parameters, or of convolution weights (convs).", choices=("all", "convs")
    )
    schedule: str = setting("cosine", "Learning-rate schedule, see 'repan list schedules'.")
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up at the start of each schedule.", low=0)
    loss: str = setting(
        "ce", "ce: cross-entropy over classes; bce: binary cross-entropy, summed over classes.", choices=("ce", "bce")
    )
    label_smoothing: float = setting(0.0, "Label smoothing.", low=0, high=0.99)
    accumulate: int = setting(1, "Batches per update: the effective batch size is this times data.batch_size.", low=1)

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"optim.min_lr={self.min_lr:g} is above optim.lr={self.lr:g}"


@dataclass(frozen=True)
class CycleConfig:
    count: int = setting(4, "Number of annealing cycles after the baseline.", low=1)
    restart: str = setting(
        "repan",
        "Restart of each cycle: repan merges and regrows. Controls: none; rescale: trunks take the merged scale only.",
        choices=("repan", "none", "rescale"),
    )
    schedule: str = setting(
        "continuous",
        "continuous: one learning-rate schedule over baseline and cycles, from the baseline's rate; restart: a new one "
        "in each cycle. Its shape is optim.schedule.",
        choices=("continuous", "restart"),
    )
    lr_decay: float = setting(
        1.0, "With schedule=restart: factor on the learning rate from one cycle to the next.", above=0
    )
    rule: str = setting(
        "calibrate",
        "Restoration of the trunk: calibrate keeps train mode too; running (as released) and reset only eval mode.",
        choices=("calibrate", "running", "reset"),
    )
    calibration_images: int = setting(1000, "Number of augmented training images that calibrate measures on.", low=2)
    attach: str = setting(
        "zero-gamma",
        "How new branches start: zero-gamma: rate 1, last gamma 0; compensated: at full strength, offset by the "
        "trunk; ramp: a rising attach rate; one: all at once.",
        choices=("zero-gamma", "compensated", "ramp", "one"),
    )
    attach_epochs: float = setting(5.0, "Length in epochs of the ramp and of freeze_trunk.", low=0)
    freeze_trunk: bool = setting(False, "Keep the trunk's parameters fixed during attach_epochs.")
    branch_init: str = setting(
        "kaiming", "Initial weights of new branches: kaiming, or small (std 0.01).", choices=("kaiming", "small")
    )
    trunk_scale: str = setting(
        "pace",
        "Scale of the trunk's weights under calibrate: pace: each channel's old gamma / sigma, so the trunk learns as "
        "fast as before; keep: each channel's old norm; merged: the kernel as it is.",
        choices=("pace", "keep", "merged"),
    )
    momentum: str = setting(
        "carry",
        "Optimizer state at the start of a cycle: carry it over, converted for the merged trunk, or zero it.",
        choices=("carry", "zero"),
    )
    start_from: str = setting(
        "last",
        "Weights that the next cycle starts from: last; best (by validation); best-test, as released: chosen on the "
        "test set, so test results are biased.",
        choices=("last", "best", "best-test"),
    )
    reseed: str = setting(
        "fresh", "Data order of a cycle: fresh, or the same as in the first cycle.", choices=("fresh", "same")
    )

    def problems(self) -> Iterator[str]:
        if self.schedule == "continuous" and self.lr_decay != 1:
            yield "cycle.lr_decay needs cycle.schedule=restart; with continuous set it to 1"


PREVIOUS = "previous"
"""The teacher that is the merged network of the cycle before."""


@dataclass(frozen=True)
class TeacherConfig:
    name: str | None = setting(
        None,
        "Teacher: a file of weights, timm:NAME or torchvision:NAME (pretrained), or previous (in cycle: the merged "
        "network of the cycle before).",
        path=True,
    )
    model: str | None = setting(None, "Network of a teacher's file that repan did not write.", path=True)
    alpha: float = setting(0.5, "Weight of the distillation loss; the rest is the cross-entropy.", low=0, high=1)
    temperature: float = setting(4.0, "Temperature of the distillation loss.", above=0)
    image_size: int | None = setting(None, "Side of the teacher's images in pixels; null: the teacher's own.", low=4)
    cache: str = setting(
        "auto",
        "Cache the teacher's logits of every augmented view: auto, if views can be identified; views; none.",
        choices=("auto", "views", "none"),
    )

    def problems(self) -> Iterator[str]:
        if self.model is not None and self.name is None:
            yield "teacher.model needs teacher.name, the file of its weights"


@dataclass(frozen=True)
class EmaConfig:
    enabled: bool = setting(False, "Score and save an exponential average of the weights; a restart resets it.")
    decay: float = setting(0.9998, "Decay of the average per update; lower at first.", low=0, high=0.999999)


@dataclass(frozen=True)
class RunConfig:
    seed: int = setting(0, "Seed of weights, data order and augmentation.", low=0)
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N or mps.")
    precision: str = setting(
        "auto",
        "auto: bf16 if the device supports it, else fp32; bf16; fp16, with a loss scaler; tf32, fp32 with 10-bit "
        "mantissas on NVIDIA GPUs; fp32. Evaluation uses fp32.",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
    )
    threads: int | None = setting(
        None,
        "CPU threads of PyTorch; null: the cores that are free when the run begins, or OMP_NUM_THREADS. Results "
        "depend on it in the last bits, so a resumed run keeps its number.",
        low=1,
    )
    channels_last: bool = setting(True, "Channels-last memory format.")
    sync_bn: bool = setting(False, "Synchronize BN statistics across GPUs in every step, for small batches.")
    compile: str = setting(
        "auto",
        "torch.compile of the training pass: on needs a C++ compiler and about a minute; off; auto means off, as "
        "short runs lose more than they gain.",
        choices=("auto", "on", "off"),
    )
    graph: str = setting(
        "auto",
        "Run a training step as one CUDA graph: auto, on a GPU where possible; on; off.",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = setting(False, "Only kernels that add in a fixed order, to repeat runs on a GPU.")
    out: str | None = setting(None, "Run directory; default runs/COMMAND/TIME-MODEL-BLOCK-DATASET.", path=True)
    log_every: int = setting(20, "Training steps between two readings of the loss (each is a host-device sync).", low=1)
    save_every: int | None = setting(
        None, "Training steps between two saves in an epoch; null saves after epochs and when asked to stop.", low=1
    )
    patience: int | None = setting(
        None, "End the run after this many epochs without a better validation top-1; null trains all epochs.", low=1
    )
    max_hours: float | None = setting(
        None, "Save and stop after this many hours; --resume continues for as long again; null: no limit.", above=0
    )
    trackers: tuple[str, ...] = setting(
        (), "Trackers that also receive the metrics, such as [tensorboard,wandb]; see 'repan list trackers'."
    )


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    block: BlockConfig = field(default_factory=BlockConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = setting(30, "Number of epochs of the run; in cycle, of each cycle.", low=1)
    baseline: Mapping[str, Any] = field(default_factory=dict)
    """`epochs`, `optim.*` and `teacher.*` keys that the baseline phase of `cycle` lays over the main ones."""
    cycle: CycleConfig = field(default_factory=CycleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def problems(self) -> Iterator[str]:
        if self.data.val_fraction == 0 and self.cycle.start_from == "best":
            yield "cycle.start_from=best needs a validation part; set data.val_fraction above 0 or start_from=last"
        if self.data.val_fraction == 0 and self.run.patience is not None:
            yield "run.patience needs a validation part; set data.val_fraction above 0"


def _declared() -> Iterator[Setting]:
    hints = typing.get_type_hints(Config)
    for entry in dataclasses.fields(Config):
        if entry.name == "baseline":
            continue
        if not dataclasses.is_dataclass(hints[entry.name]):
            yield Setting(entry.name, hints[entry.name], entry.default, **entry.metadata)
            continue
        inner = typing.get_type_hints(hints[entry.name])
        for leaf in dataclasses.fields(hints[entry.name]):
            yield Setting(f"{entry.name}.{leaf.name}", inner[leaf.name], leaf.default, **leaf.metadata)


SCHEMA: dict[str, Setting] = {entry.key: entry for entry in _declared()}
"""Every setting by its dotted key."""

OVERLAY: dict[str, Setting] = {
    f"baseline.{key}": entry
    for key, entry in SCHEMA.items()
    if key == "epochs" or key.startswith(("optim.", "teacher."))
}
"""The keys of the baseline phase, typed as the settings they are laid over."""

DECLARED: dict[str, Setting] = {**SCHEMA, **OVERLAY}
"""The settings of `SCHEMA` and `OVERLAY`."""


def from_flat(values: Mapping[str, Any]) -> Config:
    """Return the configuration of typed values by dotted key, such as `flatten` gives."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    baseline = {key.removeprefix("baseline."): value for key, value in values.items() if key in OVERLAY}
    return replace(dataclasses.replace(Config(), baseline=baseline), {k: v for k, v in values.items() if k in SCHEMA})


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with some typed values changed, by dotted key."""
    sections: dict[str, dict[str, Any]] = {}
    top = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            top[key] = value
    changed = {name: dataclasses.replace(getattr(config, name), **inner) for name, inner in sections.items()}
    return dataclasses.replace(config, **changed, **top)


def baseline_phase(config: Config) -> Config:
    """Return the configuration that the baseline of `cycle` trains with: without a teacher, unless it names its own."""
    laid_over = {"teacher.name": None, **config.baseline}
    return dataclasses.replace(replace(config, laid_over), baseline={})


def flatten(config: Config, *, cycles: bool = True) -> dict[str, Any]:
    """Return typed values by dotted key; without `cycles`, only those that `train` uses."""
    flat = {}
    for key in SCHEMA:
        section, dot, name = key.partition(".")
        value = getattr(getattr(config, section), name) if dot else getattr(config, section)
        flat[key] = list(value) if isinstance(value, tuple) else value
    if not cycles:
        return {key: value for key, value in flat.items() if not key.startswith("cycle.")}
    return {**flat, **{f"baseline.{key}": value for key, value in config.baseline.items()}}
