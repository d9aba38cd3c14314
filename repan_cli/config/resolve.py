"""Resolve layers of settings, or a command line, to a checked configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repan_cli.config.conventions import DATASET_PREFIXES
from repan_cli.config.files import find_preset, presets, read_file
from repan_cli.config.schema import Layer
from repan_cli.config.settings import DECLARED, OVERLAY, PREVIOUS, RECIPES, SCHEMA, Config, baseline_phase, from_flat
from repan_cli.errors import InputError
from repan_cli.registry import closest, did_you_mean
from repan_cli.system.text import at_home, count, on_one_line

# ---------------------------------------------------------------------------------------------- building


def build(*layers: Layer) -> Config:
    """Return the configuration that `layers` describe; later layers win.

    Raises `InputError` with one line for each fault: unknown keys, values of the wrong type or out of bounds, and
    settings that contradict each other.
    """
    config = from_flat(typed(*layers))
    if problems := [*_section_problems(config)]:
        raise InputError("\n".join(problems))
    return config


def typed(*layers: Layer) -> dict[str, Any]:
    """Return the values in `layers`, which are text, typed and by dotted key; later layers win.

    Raises InputError with one line for each unknown key and each value of the wrong type or out of bounds.
    """
    problems, values = [], {}
    for key, text in {key: text for layer in layers for key, text in layer.items()}.items():
        entry = DECLARED.get(key)
        if entry is None:
            problems.append(_unknown_key(key, text))
            continue
        try:
            values[key] = entry.parse(text)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise InputError("\n".join(map(on_one_line, problems)))
    return values


OTHER_WORDS = {
    **dict.fromkeys(("cycles", "num_cycles", "n_cycles"), "cycle.count"),
    **dict.fromkeys(("dataset", "data_set", "data"), "data.name"),
    **dict.fromkeys(("data_root", "data_dir", "data_path"), "data.root"),
    **dict.fromkeys(("batch", "bs", "batchsize", "train_batch_size"), "data.batch_size"),
    **dict.fromkeys(("img_size", "imgsz", "resolution", "input_size", "size"), "data.image_size"),
    **dict.fromkeys(("aa", "auto_augment", "augmentation", "aug"), "data.augment"),
    **dict.fromkeys(("reprob", "random_erase", "random_erasing"), "data.erase"),
    **dict.fromkeys(("num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("learning_rate", "base_lr", "lr0"), "optim.lr"),
    **dict.fromkeys(("wd",), "optim.weight_decay"),
    **dict.fromkeys(("optimizer", "opt"), "optim.name"),
    **dict.fromkeys(("scheduler", "lr_schedule", "lr_scheduler", "sched"), "optim.schedule"),
    **dict.fromkeys(("warmup", "warmup_epoch", "lr_warmup_epochs"), "optim.warmup_epochs"),
    **dict.fromkeys(("smoothing",), "optim.label_smoothing"),
    **dict.fromkeys(("clip_grad", "grad_clip", "clip_grad_norm"), "optim.clip"),
    **dict.fromkeys(("grad_accum_steps", "grad_accum", "accum_iter", "accumulate_grad_batches"), "optim.accumulate"),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("arch", "architecture", "backbone", "network", "net"), "model.name"),
    **dict.fromkeys(("weights", "checkpoint", "ckpt", "initial_checkpoint", "load"), "model.init"),
    **dict.fromkeys(("model_ema", "ema"), "ema.enabled"),
    **dict.fromkeys(("model_ema_decay", "ema_decay"), "ema.decay"),
    **dict.fromkeys(("gpu", "gpus", "accelerator"), "run.device"),
    **dict.fromkeys(("amp", "fp16", "bf16", "half", "mixed_precision", "dtype"), "run.precision"),
    **dict.fromkeys(("torchcompile", "torch_compile"), "run.compile"),
    **dict.fromkeys(
        ("out_dir", "output", "output_dir", "save_dir", "logdir", "log_dir", "work_dir", "project"), "run.out"
    ),
    **dict.fromkeys(("logger", "loggers", "log_wandb", "wandb", "tensorboard"), "run.trackers"),
    **dict.fromkeys(("log_interval", "print_freq"), "run.log_every"),
    **dict.fromkeys(("random_seed", "manual_seed"), "run.seed"),
}
"""Other tools' words for our settings."""

SECTIONS = {known.partition(".")[0] for known in SCHEMA if "." in known} | {"baseline"}
"""The words before the dot in the keys of settings."""

NAMED = ("model", "data", "block", "teacher")
"""Sections that are named after the thing that they describe."""

SEVERAL = 3
"""The largest number of settings that a message suggests."""


def _unknown_key(key: str, value: Any) -> str:
    if key in SECTIONS and isinstance(value, str) and key in NAMED and not value.isdigit():
        return f"{key} is a section; did you mean {key}.name={value}?"
    if key in SECTIONS:
        return f"{key} is a section: give {key}.SETTING=VALUE, see 'repan list settings \"{key}.*\"'"
    leaf = key.rpartition(".")[2].lower()
    same = [known for known in SCHEMA if known.rpartition(".")[2] == leaf]
    same = (closest(key, same) or same)[:SEVERAL] or ([OTHER_WORDS[leaf]] if leaf in OTHER_WORDS else [])
    hint = f"; did you mean {' or '.join(same)}?" if same else did_you_mean(key, DECLARED)
    return f"unknown setting '{key}'{hint or '; see repan list settings'}"


def _section_problems(config: Config) -> Iterator[str]:
    yield from config.model.problems()
    yield from config.block.problems()
    yield from config.data.problems()
    yield from config.optim.problems()
    yield from config.cycle.problems()
    yield from config.teacher.problems()
    yield from config.problems()
    yield from (f"baseline: {problem}" for problem in baseline_phase(config).optim.problems())


def folder_as_data(layer: Layer) -> Layer:
    """Return a layer in which a folder given as data set becomes `folder` with this root.

    Raises InputError for two folders.
    """
    name, root = layer.get("data.name"), layer.get("data.root")
    if not isinstance(name, str) or data_given(name, None)[0] == name:
        return layer
    name, root = data_given(name, None if root is None else str(root))
    return {**layer, "data.name": name, "data.root": root}


def data_given(name: str, root: str | None) -> tuple[str, str | None]:
    """Return the name and the root of a data set; if a folder is given as name, it is the root of `folder`.

    Raises InputError if a folder is given as name and another as root.
    """
    known = name in RECIPES or name.partition("/")[0] in DATASET_PREFIXES
    if known or not name or not Path(at_home(name)).is_dir():
        return name, root
    if root is not None:
        raise InputError(f"data.name={name} is a folder, and data.root={root} is another: give one of them")
    return "folder", at_home(name)


def baseline_layer(layer: Layer) -> dict[str, Any]:
    """Return a file's layer as `train` reads it: with the baseline's keys over the main ones, and without the
    cycles.
    """
    main = {key: text for key, text in layer.items() if not key.startswith(("baseline.", "cycle."))}
    laid_over = {key.removeprefix("baseline."): text for key, text in layer.items() if key in OVERLAY}
    return {**main, **laid_over}


# ---------------------------------------------------------------------------------------------- from the command line


@dataclass(frozen=True)
class Resolved:
    """A configuration and its origin.

    It holds a line that names the source, the settings that the command line gave, and those of a user's `own` file.
    """

    config: Config
    source: str
    given: Layer = field(default_factory=dict)
    own: Layer = field(default_factory=dict)


def resolve(command: str, file: str | None, given: Layer) -> Resolved:
    """Return the configuration of `repan COMMAND -c FILE`, with the settings `given` on the command line on top.

    Without a file, the recipe of the data set is read if there is one. `train` reads the baseline of a file of cycles.
    """
    given = folder_as_data(given)
    if file is None:
        file = RECIPES.get(str(given.get("data.name")))
    path = find_preset(file) if file else None
    layer = read_file(path) if path else {}
    found = resolve_layer(command, layer, given, source=_shown(path))
    return found if path in presets().values() else dataclasses.replace(found, own=_changed(layer))


def _changed(layer: Layer) -> Layer:
    """Return the settings of a file that differ from the defaults: the config.yaml of a run holds all settings."""
    known = {key: text for key, text in layer.items() if key in SCHEMA}
    return {key: known[key] for key, value in typed(known).items() if value != SCHEMA[key].default}


def resolve_layer(command: str, layer: Layer, given: Layer, *, source: str) -> Resolved:
    """Return the configuration of a command from a file's layer, which `source` names, and the settings `given`.

    Raises InputError for settings that the command does not read, and if a data set, network or teacher is missing.
    """
    layer, given = folder_as_data(layer), folder_as_data(given)
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
    if command == "cycle" and config.cycle.schedule == "continuous" and config.model.init is None:
        _refuse_two_rates(config, given)
    if command == "distill" and config.teacher.name in (None, PREVIOUS):
        raise InputError("no teacher: give --teacher FILE or timm:NAME ('previous' is for 'repan cycle')")
    by_hand = f", and {count(len(given), 'setting')} from the command line" if given else ""
    return Resolved(config, f"{source}{by_hand}", given)


def _refuse_two_rates(config: Config, given: Layer) -> None:
    """Refuse a rate for the cycles if one schedule continues from the baseline's rate, because it would have no
    effect.
    """
    rate = baseline_phase(config).optim.lr
    if "optim.lr" in given and config.optim.lr != rate:
        raise InputError(
            f"optim.lr={config.optim.lr:g} has no effect with cycle.schedule=continuous, one schedule that starts at "
            f"the baseline's {rate:g}: give --baseline-lr instead of --lr, or cycle.schedule=restart"
        )


def _shown(path: Path | None) -> str:
    """Return a path as users type it: the name of a preset, or a path."""
    if path is None:
        return "defaults"
    return next((name for name, preset in presets().items() if preset == path), str(path))


def refuse(given: Layer, sections: tuple[str, ...], why: str) -> None:
    """Raise InputError if the command line gave a setting of these sections."""
    for key in given:
        if key.startswith(sections):
            raise InputError(f"{key} {why}")
