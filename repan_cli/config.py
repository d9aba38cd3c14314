"""Settings: declared once here, read from YAML and KEY=VALUE as text, typed by the schema, checked all at once.

A `Config` is a tree of frozen dataclasses, one a section. Everything else about a setting (its text, type, bounds,
default) follows from its one declaration. Layers of settings are flat, `{"optim.lr": "0.1"}`, and the later layer
wins: defaults < `base:` file < `-c` file < command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean

RECIPES = {
    "digits": "recipes/digits",
    "folder": "recipes/folder",
    "imagenet": "recipes/imagenet",
    **dict.fromkeys(("cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "synthetic"), "recipes/cifar"),
    **dict.fromkeys(("imagenet16", "imagenet16_120", "imagenet16_150", "imagenet16_200"), "recipes/cifar"),
}
"""The recipe a data set is trained with when no `-c FILE` is given."""

SWITCHES = {"true": "on", "yes": "on", "false": "off", "no": "off"}
"""What people say for the choices on and off."""

POLICIES = ("autoaugment", "randaugment", "trivialaugment")
"""Augmentation policies that work on one picture at a time."""

Layer = Mapping[str, Any]


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with its text, and its bounds: low <= value, above < value, value <= high."""
    metadata = {"text": text, "choices": choices, "low": low, "above": above, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
    name: str | None = setting(
        None, "Network: repvgg, repvgg_a1_cifar, timm:NAME, torchvision:NAME, or your own as file.py:function."
    )
    pretrained: bool = setting(False, "Start from the weights that timm or torchvision offers for the network.")
    init: str | None = setting(
        None, "File of weights to start from, repan's or others'; cycle then skips the baseline if its classes fit."
    )

    def problems(self) -> Iterator[str]:
        if self.pretrained and self.init:
            yield "model.pretrained and model.init both say which weights to start from: give one"
        name = self.name or ""
        if name.endswith((".pt", ".pth", ".safetensors")):
            yield f"model.name={name} is a file of weights: give it as --init, and --model where it is not repan's"
        if name.endswith(".py"):
            yield f"model.name={name} needs the function in it that builds the network: {name}:FUNCTION"


@dataclass(frozen=True)
class Block:
    name: str | None = setting(
        None, "Block family, see 'repan list blocks'; null: the network's own blocks where it has them, else repvgg."
    )
    kernel: tuple[int, ...] = setting(
        (), "Kernel sizes of the convolutions that become blocks, such as [3,5]; [] is all above 1.", low=1
    )
    include: tuple[str, ...] = setting((), "Only convolutions whose names match one of these globs; [] is all.")
    exclude: tuple[str, ...] = setting((), "No convolutions whose names match one of these globs.")
    limit: int | None = setting(None, "At most this many blocks, those with the most weights first.", low=1)
    branches: int | None = setting(None, "Number of k x k side branches (mobileone; null is 3).", low=1)


@dataclass(frozen=True)
class Data:
    name: str | None = setting(None, "Data set, see 'repan list datasets'.")
    root: str = setting("data", "Folder of the data sets; ROOT/NAME is read (for 'folder': ROOT itself).")
    image_size: int | None = setting(None, "Side of the images in pixels; null takes the data set's own.", low=4)
    batch_size: int = setting(128, "Images a training step.", low=2)
    val_fraction: float = setting(
        0.1, "Part of the training set held out to choose by; 0 trains on everything.", low=0, high=0.9
    )
    split_seed: int = setting(0, "Seed of that part, independent of run.seed.", low=0)
    channels: int | None = setting(None, "1 reads images in grey, 3 in colour; null takes the data set's own.", low=1)
    classes: int | None = setting(
        None,
        "Number of classes: only the first so many by name; null is all. Of 'synthetic' as many are made; null is 10.",
        low=2,
    )
    per_class: int | None = setting(
        None, "Training images of each class, at most: the first so many, of which val_fraction is held out.", low=1
    )
    augment: str = setting(
        "standard",
        "standard: random crop, and flip where that makes sense; a policy on top of it: autoaugment, randaugment, "
        "trivialaugment; none.",
        choices=("standard", *POLICIES, "none"),
    )
    crop: str = setting(
        "auto",
        "pad: images in memory are padded and cropped; resized: a part of each is cropped and resized, read one by "
        "one; auto: pad up to 64 pixels, else resized.",
        choices=("auto", "pad", "resized"),
    )
    crop_padding: int | None = setting(
        None, "Pixels around the image before the random crop; null is an eighth of its side.", low=0
    )
    crop_area: float = setting(0.08, "Least part of an image's area under crop=resized.", above=0, high=1)
    cutout: int = setting(0, "Side in pixels of a square that is blanked in every training image; 0 is none.", low=0)
    erase: float = setting(0.0, "Share of training images in which a random rectangle is blanked.", low=0, high=1)
    mixup: float = setting(0.0, "Alpha of mixup; 0 is none. With cutmix, each batch draws one of both.", low=0)
    cutmix: float = setting(0.0, "Alpha of CutMix; 0 is none.", low=0)
    workers: int | None = setting(
        None, "Processes that read images one by one; null is one a core beside a GPU, else one.", low=0
    )
    on_error: str = setting(
        "stop", "Training images that cannot be read: stop, or skip them, counted.", choices=("stop", "skip")
    )

    def problems(self) -> Iterator[str]:
        if self.channels == 2 or (self.channels or 0) > 3:
            yield f"data.channels={self.channels} is neither 1 nor 3"
        if self.name and self.name not in RECIPES and Path(self.name).is_dir():
            yield f"data.name={self.name} is a folder: give --dataset folder --data-root {self.name}"


@dataclass(frozen=True)
class Optim:
    name: str = setting("sgd", "Optimizer: sgd, or one of timm's, see 'repan list optimizers'.")
    lr: float = setting(0.1, "Peak learning rate.", above=0)
    min_lr: float = setting(0.0, "Learning rate that the schedule ends at.", low=0)
    momentum: float = setting(0.9, "Momentum, of optimizers that have it.", low=0, high=0.9999)
    nesterov: bool = setting(True, "Nesterov momentum (no effect without momentum).")
    weight_decay: float = setting(5e-4, "Weight decay.", low=0)
    decay: str = setting(
        "weights", "What decays: weights spares BN, biases and the classifier; all.", choices=("weights", "all")
    )
    clip: float | None = setting(10.0, "Bound on the gradient's norm; null is none.", above=0)
    clip_params: str = setting(
        "all", "Whose gradient is clipped: all parameters, or the convs' weights.", choices=("all", "convs")
    )
    schedule: str = setting("cosine", "Course of the learning rate, see 'repan list schedules'.")
    warmup_epochs: float = setting(0.0, "Epochs of linear warm-up at the start of each course.", low=0)
    loss: str = setting(
        "ce", "ce: cross-entropy over classes; bce: a binary one for each class, summed.", choices=("ce", "bce")
    )
    label_smoothing: float = setting(0.0, "Label smoothing.", low=0, high=0.99)
    accumulate: int = setting(
        1, "Batches an update takes: the effective batch is so many times data.batch_size.", low=1
    )

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"optim.min_lr={self.min_lr:g} is above optim.lr={self.lr:g}"


@dataclass(frozen=True)
class Cycle:
    count: int = setting(4, "Number of annealing cycles after the baseline.", low=1)
    restart: str = setting(
        "repan", "At the start of a cycle: repan merges and regrows; none is the control.", choices=("repan", "none")
    )
    lr: str = setting(
        "continuous",
        "continuous: one course over baseline and cycles, from the baseline's rate; restart: a new one in every cycle.",
        choices=("continuous", "restart"),
    )
    lr_decay: float = setting(1.0, "Factor on the learning rate from one cycle to the next.", above=0)
    rule: str = setting(
        "calibrate",
        "How merged weights return to the trunk: calibrate keeps train mode too; running (as released), reset do not.",
        choices=("calibrate", "running", "reset"),
    )
    calibration_images: int = setting(1000, "Augmented training images that calibrate measures on.", low=2)
    attach: str = setting(
        "zero-gamma",
        "How fresh branches come in: zero-gamma: rate 1, last gamma 0; compensated: at full strength, which the trunk "
        "makes up for; ramp of the attach rate; one: all at once.",
        choices=("zero-gamma", "compensated", "ramp", "one"),
    )
    attach_epochs: float = setting(5.0, "Epochs of the ramp, and of freeze_trunk.", low=0)
    freeze_trunk: bool = setting(False, "Keep the trunk's parameters fixed during attach_epochs.")
    branch_init: str = setting(
        "kaiming", "Weights of fresh branches: kaiming, or small (std 0.01).", choices=("kaiming", "small")
    )
    trunk_scale: str = setting(
        "merged",
        "Scale of the trunk's weights under calibrate: merged kernel as it is, or keep each channel's old norm.",
        choices=("merged", "keep"),
    )
    start_from: str = setting(
        "last",
        "Weights the next cycle starts from: last; best on the validation part; best-test, as released: the test set "
        "chooses, so that its figures mean less.",
        choices=("last", "best", "best-test"),
    )
    reseed: str = setting(
        "fresh", "Data order of a cycle: fresh, or the same as in the first cycle.", choices=("fresh", "same")
    )

    def problems(self) -> Iterator[str]:
        if self.trunk_scale == "keep" and self.rule != "calibrate":
            yield f"cycle.trunk_scale=keep belongs to cycle.rule=calibrate, not {self.rule}"
        if self.lr == "continuous" and self.lr_decay != 1:
            yield "cycle.lr_decay belongs to cycle.lr=restart; with continuous set it to 1"


PREVIOUS = "previous"
"""The teacher that is the merged network of the cycle before."""


@dataclass(frozen=True)
class Teacher:
    name: str | None = setting(
        None,
        "Teacher: a file of weights, timm:NAME or torchvision:NAME (pretrained), or previous (in cycle: the merged "
        "network of the cycle before).",
    )
    model: str | None = setting(None, "Network of a teacher's file that is not repan's.")
    alpha: float = setting(0.5, "Share of the distillation loss; the rest is the cross-entropy.", low=0, high=1)
    temperature: float = setting(4.0, "Temperature of the distillation loss.", above=0)
    image_size: int | None = setting(None, "Side of the images that the teacher sees; null is its own.", low=4)
    cache: str = setting(
        "auto",
        "Keep the teacher's logits of every view that was seen: auto, where views can be told apart; views; none.",
        choices=("auto", "views", "none"),
    )

    def problems(self) -> Iterator[str]:
        if self.model is not None and self.name is None:
            yield "teacher.model needs teacher.name, the file of its weights"


@dataclass(frozen=True)
class Ema:
    enabled: bool = setting(False, "Score and save an exponential average of the weights; a restart begins it anew.")
    decay: float = setting(0.9998, "Its decay an update; lower at first.", low=0, high=0.999999)


@dataclass(frozen=True)
class Run:
    seed: int = setting(0, "Seed of weights, data order and augmentation.", low=0)
    device: str = setting("auto", "auto (a GPU where there is one), cpu, cuda, cuda:N or mps.")
    precision: str = setting(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; bf16; fp16, with a loss scaler; fp32.",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    channels_last: bool = setting(True, "Channels-last memory format.")
    sync_bn: bool = setting(False, "Share BN statistics among the GPUs of a job in every step, for small batches.")
    compile: str = setting(
        "auto",
        "torch.compile of the training pass, which needs a C++ compiler and about a minute: on; off; auto is off, as "
        "short runs lose more than they win.",
        choices=("auto", "on", "off"),
    )
    graph: str = setting(
        "auto",
        "A training step as one CUDA graph: auto, on a GPU where that can be; on; off.",
        choices=("auto", "on", "off"),
    )
    out: str | None = setting(None, "Run directory; by default runs/COMMAND/TIME-MODEL-BLOCK-DATASET.")
    log_every: int = setting(20, "Training steps between two looks at the loss (a host-device sync each).", low=1)
    save_every: int | None = setting(
        None, "Training steps between two saves inside an epoch; null saves at its end, and when asked to stop.", low=1
    )
    trackers: tuple[str, ...] = setting(
        (), "Where figures go beside metrics.jsonl and metrics.csv: [tensorboard,wandb], see 'repan list trackers'."
    )


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    block: Block = field(default_factory=Block)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    epochs: int = setting(30, "Length of the run, or of one cycle.", low=1)
    baseline: Mapping[str, Any] = field(default_factory=dict)
    """`epochs`, `optim.*` and `teacher.*` keys that the baseline phase of `cycle` lays over the main ones."""
    cycle: Cycle = field(default_factory=Cycle)
    teacher: Teacher = field(default_factory=Teacher)
    ema: Ema = field(default_factory=Ema)
    run: Run = field(default_factory=Run)

    def problems(self) -> Iterator[str]:
        if self.data.val_fraction == 0 and self.cycle.start_from == "best":
            yield "cycle.start_from=best needs a validation part; set data.val_fraction above 0 or start_from=last"


@dataclass(frozen=True)
class Setting:
    """One declared setting: its dotted key, type, default, text and bounds."""

    key: str
    type: Any
    default: Any
    text: str
    choices: tuple[str, ...]
    low: float | None
    above: float | None
    high: float | None

    def parse(self, text: Any) -> Any:
        """The value that `text` (a string, or a list of them) means. Raises ValueError with what is wrong."""
        kind, optional = _optional(self.type)
        if optional and text in ("null", "~", "", "None", None):
            return None
        if typing.get_origin(kind) is tuple:
            return tuple(self._parse_one(typing.get_args(kind)[0], part) for part in _parts(text))
        return self._parse_one(kind, text)

    def describe(self) -> dict[str, Any]:
        """What programs may want to know of it."""
        kind, optional = _optional(self.type)
        many = typing.get_args(kind)
        name = f"list of {many[0].__name__}" if many else kind.__name__
        facts = {"text": self.text, "type": f"{name} or null" if optional else name, "default": self.default}
        bounds = {"choices": list(self.choices), "low": self.low, "above": self.above, "high": self.high}
        return {**facts, **{name: bound for name, bound in bounds.items() if bound not in (None, [])}}

    def _parse_one(self, kind: type, text: Any) -> Any:
        if not isinstance(text, str):
            raise ValueError(f"expected one value, not {text!r}")
        value = _PARSERS[kind](text.strip())
        if "on" in self.choices:
            value = SWITCHES.get(value, value)
        self._check_bounds(value)
        return value

    def _check_bounds(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices) or f"; choose {' or '.join(self.choices)}"
            raise ValueError(f"'{value}' is not a choice{hint}")
        for bound, broken, words in (
            (self.low, lambda: value < self.low, "at least"),
            (self.above, lambda: value <= self.above, "above"),
            (self.high, lambda: value > self.high, "at most"),
        ):
            if bound is not None and broken():
                raise ValueError(f"{value:g} must be {words} {bound:g}")


def _optional(kind: Any) -> tuple[Any, bool]:
    if isinstance(kind, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


def _parts(text: Any) -> list[Any]:
    """The elements of a list: YAML's own, or `[a,b]` or `a,b` as text."""
    if isinstance(text, str):
        text = [part for part in text.strip().removeprefix("[").removesuffix("]").split(",") if part.strip()]
    return text or []


def _parse_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def _parse_int(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():  # also nan and inf
        raise ValueError(f"'{text}' is not a whole number")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not a finite number")
    return number


_PARSERS = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: str}


def as_text(value: Any) -> str:
    """A value as people type it."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


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


# ---------------------------------------------------------------------------------------------- reading


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars all stay text, whose duplicate keys are errors, and whose aliases stand for one value.

    An alias of lists of aliases of lists is how a file of a few lines fills the memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        alias = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an alias can stand for one value only", problem_mark=alias)
        return node


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="expected 'key: value' lines", problem_mark=node.start_mark)
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_TextLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The flat layer of settings in a YAML text. `source` names it in errors."""
    try:
        tree = yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two: "\\U00110000"
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(_on_one_line(f"{source}{where}: {getattr(error, 'problem', None) or 'not YAML'}")) from None
    if tree is None or tree == "":
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected 'key: value' lines, found {type(tree).__name__}")
    return dict(_flatten(tree, ""))


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def preset_folders() -> list[Path]:
    """Where presets lie: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def presets() -> dict[str, Path]:
    """The shipped presets by name, such as recipes/cifar."""
    found = {}
    for folder in preset_folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def find_preset(name: str, *, near: Path | None = None) -> Path:
    """The file that `name` means: a path, a path beside the file `near`, or the name of a shipped preset."""
    for path in (Path(name), *([near.parent / name] if near else [])):
        with contextlib.suppress(OSError):  # a name that is too long for one
            if path.is_file():
                return path
    shipped = presets()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    hint = did_you_mean(name, shipped) or "; 'repan list presets' shows those that ship with repan"
    raise InputError(f"no configuration file or preset '{name}'{hint}")


def read_file(path: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The layer of settings in a file, laid over that of its `base:` file."""
    if path.resolve() in seen:
        raise InputError(f"{path}: 'base' leads back to itself")
    try:
        layer = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    base = layer.pop("base", None)
    if not base:
        return layer
    if not isinstance(base, str):
        raise InputError(f"{path}: base: expected the name of one file")
    try:
        found = find_preset(base, near=path)
    except InputError as error:
        raise InputError(_on_one_line(f"{path}: base: {error}")) from None
    return {**read_file(found, seen=(*seen, path.resolve())), **layer}


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """The layer of `KEY=VALUE` words from the command line."""
    layer: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            spaced = key in SCHEMA or word.startswith("=")
            how = "without a space beside the '='" if spaced else "such as optim.lr=0.1"
            raise InputError(f"'{word}' is not KEY=VALUE, {how}")
        if key in layer:
            raise InputError(f"{key} is given twice on the command line")
        layer[key] = value
    return layer


# ---------------------------------------------------------------------------------------------- building


def build(*layers: Layer) -> Config:
    """The configuration that `layers` describe, the later one winning.

    Raises `InputError` with one line for each thing wrong: unknown keys, values of the wrong type or out of bounds,
    settings that contradict each other.
    """
    config = from_flat(typed(*layers))
    if problems := [*_section_problems(config)]:
        raise InputError("\n".join(problems))
    return config


def typed(*layers: Layer) -> dict[str, Any]:
    """The values that `layers` give as text, by dotted key, the later one winning.

    Raises InputError with one line for each unknown key and each value of the wrong type or out of bounds.
    """
    problems, values = [], {}
    for key, text in {key: text for layer in layers for key, text in layer.items()}.items():
        entry = SCHEMA.get(key) or OVERLAY.get(key)
        if entry is None:
            problems.append(_unknown_key(key))
            continue
        try:
            values[key] = entry.parse(text)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise InputError("\n".join(map(_on_one_line, problems)))
    return values


def _on_one_line(text: str) -> str:
    """What a file says may be long, or hold line ends and what no terminal shows."""
    if len(text) > 400:
        text = f"{text[:300]} ... {text[-90:]}"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _unknown_key(key: str) -> str:
    sections = {known.partition(".")[0] for known in SCHEMA if "." in known} | {"baseline"}
    if key in sections:
        return f"{key} is a section: give {key}.SETTING=VALUE, see 'repan list settings \"{key}.*\"'"
    same = [known for known in SCHEMA if known.rpartition(".")[2] == key]
    hint = f"; did you mean {' or '.join(same)}?" if same else did_you_mean(key, [*SCHEMA, *OVERLAY])
    return f"unknown setting '{key}'{hint or '; see repan list settings'}"


def _section_problems(config: Config) -> Iterator[str]:
    yield from config.model.problems()
    yield from config.data.problems()
    yield from config.optim.problems()
    yield from config.cycle.problems()
    yield from config.teacher.problems()
    yield from config.problems()
    yield from (f"baseline: {problem}" for problem in baseline_phase(config).optim.problems())


def from_flat(values: Mapping[str, Any]) -> Config:
    """The configuration of typed values by dotted key, such as `flatten` gives."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    baseline = {key.removeprefix("baseline."): value for key, value in values.items() if key in OVERLAY}
    return replace(dataclasses.replace(Config(), baseline=baseline), {k: v for k, v in values.items() if k in SCHEMA})


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with some typed values changed, by dotted key."""
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
    """The configuration that the baseline of `cycle` trains with: without a teacher, unless it names its own."""
    laid_over = {"teacher.name": None, **config.baseline}
    return dataclasses.replace(replace(config, laid_over), baseline={})


def baseline_layer(layer: Layer) -> dict[str, Any]:
    """A file's layer as `train` reads it: its baseline keys laid over the main ones, the cycles left out."""
    main = {key: text for key, text in layer.items() if not key.startswith(("baseline.", "cycle."))}
    laid_over = {key.removeprefix("baseline."): text for key, text in layer.items() if key in OVERLAY}
    return {**main, **laid_over}


# ---------------------------------------------------------------------------------------------- writing


def flatten(config: Config, *, cycles: bool = True) -> dict[str, Any]:
    """Typed values by dotted key; without `cycles`, what `train` uses."""
    flat = {}
    for key in SCHEMA:
        section, dot, name = key.partition(".")
        value = getattr(getattr(config, section), name) if dot else getattr(config, section)
        flat[key] = list(value) if isinstance(value, tuple) else value
    if not cycles:
        return {key: value for key, value in flat.items() if not key.startswith("cycle.")}
    return {**flat, **{f"baseline.{key}": value for key, value in config.baseline.items()}}


def dump(config: Config, *, cycles: bool = True) -> str:
    """The configuration as YAML that `-c` reads back to the same values."""
    tree: dict[str, Any] = {}
    for key, value in flatten(config, cycles=cycles).items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------- from the command line


@dataclass(frozen=True)
class Resolved:
    """A configuration, a line that says where it came from, and what of it the command line gave."""

    config: Config
    source: str
    given: Layer = field(default_factory=dict)


def resolve(command: str, file: str | None, given: Layer) -> Resolved:
    """The configuration of `repan COMMAND -c FILE`, with the settings `given` on the command line on top.

    Without a file the recipe of the data set is read, where there is one. `train` reads the baseline of a file of
    cycles.
    """
    if file is None:
        file = RECIPES.get(str(given.get("data.name")))
    path = find_preset(file) if file else None
    layer = read_file(path) if path else {}
    if command == "train":
        refuse(given, ("teacher.",), "has no effect in 'repan train': give it to 'repan distill'")
        layer = {key: text for key, text in layer.items() if not key.startswith(("teacher.", "baseline.teacher."))}
    if command != "cycle":
        refuse(given, ("cycle.", "baseline."), f"has no effect in 'repan {command}': it belongs to 'repan cycle'")
        layer = baseline_layer(layer)
    config = build(layer, given)
    if config.data.name is None:
        raise InputError("no data set: give --dataset NAME, see 'repan list datasets'")
    if config.model.name is None and config.model.init is None:
        raise InputError("no network: give --model NAME, see 'repan list models'")
    if command == "cycle" and config.cycle.lr == "continuous" and config.model.init is None:
        _refuse_two_rates(config, given)
    if command == "distill" and config.teacher.name in (None, PREVIOUS):
        raise InputError("no teacher: give --teacher FILE or timm:NAME ('previous' is for 'repan cycle')")
    return Resolved(config, f"{_shown(path)}, {len(given)} from the command line", given)


def _refuse_two_rates(config: Config, given: Layer) -> None:
    """One course runs from the baseline's rate: another one for the cycles would be silently without effect."""
    rate = baseline_phase(config).optim.lr
    if "optim.lr" in given and config.optim.lr != rate:
        raise InputError(
            f"optim.lr={config.optim.lr:g} has no effect with cycle.lr=continuous, one course from the baseline's "
            f"{rate:g}: set cycle.lr=restart, or the baseline's alone"
        )


def _shown(path: Path | None) -> str:
    """How people would type it: the name of a preset, or a path."""
    if path is None:
        return "defaults"
    return next((name for name, preset in presets().items() if preset == path), str(path))


def refuse(given: Layer, sections: tuple[str, ...], why: str) -> None:
    """Raises InputError when the command line gave a setting of these sections."""
    for key in given:
        if key.startswith(sections):
            raise InputError(f"{key} {why}")
