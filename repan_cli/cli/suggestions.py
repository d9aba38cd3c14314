"""Answer unknown commands and options, such as those of timm, torchvision and ultralytics, with those of repan."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from repan_cli.cli.options import text_of
from repan_cli.cli.words import TRAINING
from repan_cli.commands.declaration import Option, declared
from repan_cli.config import names
from repan_cli.config.conventions import FORMATS, WEIGHT_ENDINGS
from repan_cli.config.resolve import OTHER_WORDS
from repan_cli.config.settings import RECIPES, SCHEMA
from repan_cli.errors import InputError
from repan_cli.registry import closest
from repan_cli.system.text import at_home, quoted

NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")
"""A number, which is the value of the option before it even if it is negative."""

OTHER_COMMANDS = {
    **dict.fromkeys(("val", "test", "eval", "validate", "score", "accuracy"), "evaluate"),
    **dict.fromkeys(("export", "merge", "convert", "deploy", "onnx", "reparameterize", "reparam"), "fuse"),
    **dict.fromkeys(("infer", "inference", "classify"), "predict"),
    **dict.fromkeys(("bench", "speed", "profile", "latency"), "benchmark"),
    **dict.fromkeys(("fit", "pretrain"), "train"),
    **dict.fromkeys(("int8", "quant", "ptq"), "quantize"),
    **dict.fromkeys(("show", "inspect", "summary", "describe"), "info"),
    **dict.fromkeys(("sweep", "experiment", "grid"), "study"),
    **dict.fromkeys(("repan", "anneal", "restart"), "cycle"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("kd", "teach"), "distill"),
    **dict.fromkeys(("models", "datasets", "presets", "settings", "runs", "blocks"), "list {}"),
    **dict.fromkeys(("cfg", "config", "checks"), "list settings"),
    "ls": "list",
    "finetune": "cycle -c recipes/finetune",
    "resume": "cycle --resume latest",
    "version": "--version",
}
"""Words of other programs for our commands; {} is the word itself."""

SHORT = {"b": "batch", "j": "num_workers", "a": "arch", "q": "quiet", "k": "top_k", "e": "evaluate", "y": "yes"}
"""One-letter options of other programs, in their long form."""

FLAGS = {
    **{"data.batch_size": ("--batch-size", "--batch"), "data.image_size": ("--image-size",), "epochs": ("--epochs",)},
    **{"data.name": ("--dataset",), "data.root": ("--data-root",), "data.class_order": ("--classes",)},
    **{"model.name": ("--model",), "model.init": ("--init",), "teacher.name": ("--teacher",), "optim.lr": ("--lr",)},
    **{"run.out": ("--out", "--save"), "run.device": ("--device",), "run.seed": ("--seed",)},
    **{"run.precision": ("--precision",), "run.compile": ("--compile",), "cycle.count": ("--cycles",)},
}
"""The options that stand for a setting, in any command."""

OTHER_FLAGS = {
    **dict.fromkeys(("topk", "top_k"), "--top"),
    **dict.fromkeys(("force", "yes", "exist_ok"), "--overwrite"),
    **dict.fromkeys(("fp16", "float16"), "--half"),
    **dict.fromkeys(("reparam", "merged", "fuse"), "--fused"),
    **dict.fromkeys(("include", "formats"), "--format"),
    **dict.fromkeys(("name", "project"), "--out"),
    "opset_version": "--opset",
}
"""Other programs' words for options that stand for no setting."""

ON_STDERR = "progress and warnings are on stderr: add 2>/dev/null"
ADVICE = {
    **dict.fromkeys(("quiet", "silent"), ON_STDERR),
    **dict.fromkeys(("num_classes", "nb_classes", "nc"), "the data set sets the number of classes"),
    **dict.fromkeys(("evaluate", "eval", "val", "test", "validate"), "use 'repan evaluate'"),
    **dict.fromkeys(("list_models", "list"), "use 'repan list models'"),
    "int8": "use 'repan quantize'",
    "no_color": "set the variable NO_COLOR=1",
}
"""Answers to options that have no counterpart."""

SWITCHES = {
    **dict.fromkeys(("amp", "bf16", "mixed_precision"), "bf16"),
    **{"fp16": "fp16", "half": "fp16", "no_amp": "fp32"},
    **{"model_ema": "true", "ema": "true", "torchcompile": "on", "torch_compile": "on"},
    **{"log_wandb": "wandb", "wandb": "wandb", "tensorboard": "tensorboard"},
}
"""The values of our settings that switches of other programs mean."""


def unknown_command(word: str, rest: Iterable[str], commands: Iterable[str]) -> str:
    """Return the end of the message for a command that does not exist."""
    commands = list(commands)
    if near := closest(word, commands):
        return "; did you mean '" + "' or '".join(near) + "'?"
    later = next((each for each in rest if each in commands or each in OTHER_COMMANDS), None)
    meant = OTHER_COMMANDS.get(word.lower()) if later not in commands else later
    meant = meant or OTHER_COMMANDS.get(later or "")
    return f"; did you mean 'repan {meant.format(word)}'?" if meant else "; see 'repan --help'"


def unknown_options(command: str, words: Iterable[str], options: dict[str, type]) -> list[str]:
    """Return a line for each option in `words` that a command does not have; `options` holds those of all commands."""
    flags = _flags(options[command])
    strange = _strange(words, flags)
    return [f"no such option: {name}{_answer(name, value, command, flags, options)}" for name, value in strange]


def _flags(options: type) -> dict[str, bool]:
    """Return the flags of a command, and whether a value follows each."""
    declarations = [(name, kind, how) for name, kind, how, _ in declared(options) if isinstance(how, Option)]
    found = {flag: kind is not bool for name, kind, how in declarations for flag in how.flags}
    return {**found, "--help": False, "-h": False}


def _strange(words: Iterable[str], flags: dict[str, bool]) -> Iterator[tuple[str, str]]:
    """Yield each unknown option with the value that seems to belong to it."""
    rest = deque(words)
    while rest and (word := rest.popleft()) != "--":
        name, equals, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            continue
        if name in flags or (not word.startswith("--") and word[:2] in flags):
            if flags.get(name) and not equals and rest:
                rest.popleft()
            continue
        if not equals and rest and "=" not in rest[0] and (rest[0][:1] != "-" or NUMBER.fullmatch(rest[0])):
            value = rest.popleft()
        yield name, value


def _answer(name: str, value: str, command: str, flags: dict[str, bool], options: dict[str, type]) -> str:
    word = name.lstrip("-").replace("-", "_").lower()
    word = SHORT.get(word, word)
    if word in ADVICE:
        return f"; {ADVICE[word]}"
    if OTHER_FLAGS.get(word) in flags:
        return f"; did you mean {OTHER_FLAGS[word]}?"
    trains, others = command in TRAINING, [other for other, theirs in options.items() if name in _flags(theirs)]
    elsewhere = f": it belongs to other commands than 'repan {command}', such as 'repan {(others or [''])[0]}'"
    if trains and "cycle" in others:
        return elsewhere
    leaf = word.removeprefix("no_")
    keys = [key for key in SCHEMA if key.rpartition(".")[2] == word]
    keys = keys or [OTHER_WORDS[each] for each in (word, leaf) if each in OTHER_WORDS][:1]
    if len(keys) == 1 and (said := _as_option(keys[0], word, value, flags, trains=trains)):
        return f"; did you mean {said}?"
    if near := closest(name.lstrip("-"), [flag[2:] for flag in flags if flag.startswith("--")], likeness=0.66):
        return f"; did you mean --{' or --'.join(near)}?"
    if others:
        return elsewhere
    if trains and (near := closest(word, {key.rpartition(".")[2] for key in SCHEMA}, likeness=0.75)):
        meant = [key for key in SCHEMA if key.rpartition(".")[2] == near[0]]
        return f"; did you mean {' or '.join(f'{key}=' + (value or 'VALUE') for key in meant)}?"
    return f"; see 'repan {command} --help'"


def _as_option(key: str, word: str, value: str, flags: dict[str, bool], *, trains: bool) -> str | None:
    """Return a setting as a command takes it: an option, or KEY=VALUE."""
    flag = next((each for each in FLAGS.get(key, ()) if each in flags), None)
    if key == "run.device" and value.isdigit():
        value = f"cuda:{value}"
    if flag is not None:
        return f"{flag} {quoted(value)}" if value and flags[flag] else flag
    return f"{key}={SWITCHES.get(word) or value or 'VALUE'}" if trains else None


def argument_of(flag: str, options: type) -> str:
    """Return the end of the message for an option without its argument: the argument's name, and its help."""
    how = next((how for _, _, how, _ in declared(options) if isinstance(how, Option) and flag in how.flags), None)
    told = text_of(how).rstrip(".") if how else ""
    first = told[:1] if told[:2].isupper() else told[:1].lower()
    return f", {how.metavar}: {first}{told[1:]}" if how else ""


def option_of(word: str, command: str, options: type) -> str:
    """Return the end of the message for an argument too many: the option that takes it, if that is clear."""
    written = "--out" if command in ("fuse", "quantize") and Path(word).suffix else None
    wanted = "--format" if word in FORMATS else written or _option_for(word)
    return (
        f"; did you mean {wanted} {quoted(word)}?" if wanted in _flags(options) else f"; see 'repan {command} --help'"
    )


def refuse_bare_words(words: Iterable[str]) -> None:
    """Raise InputError for a word that is not KEY=VALUE but names a data set, a network or a file."""
    for word in words:
        if "=" not in word and (option := _option_for(word)):
            raise InputError(f"'{word}' is not KEY=VALUE; did you mean {option} {quoted(word)}?")


def _option_for(word: str) -> str | None:
    """Return the option that takes a word that was given without one."""
    path = Path(at_home(word))
    if word in RECIPES or path.is_dir():
        return "--dataset"
    if word.endswith(WEIGHT_ENDINGS):
        return "--init"
    if word.endswith((".yaml", ".yml")):
        return "-c"
    if word in SCHEMA:
        return None
    try:
        names.check_model(word)
    except InputError:
        return "--block" if word in names.blocks() else None
    return "--model"
