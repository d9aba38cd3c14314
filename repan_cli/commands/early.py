"""Check a command before PyTorch is loaded: missing files, unknown names, folders that exist already.

A command checks again what it opens. Nothing here reads more than the first bytes of a file.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repan_cli import runs
from repan_cli.commands.options import (
    BenchmarkOptions,
    EvaluateOptions,
    FuseOptions,
    InfoOptions,
    PredictOptions,
    QuantizeOptions,
)
from repan_cli.config import names
from repan_cli.config.advice import longer, unusual, without_effect
from repan_cli.config.conventions import (
    ARTIFACT_ENDINGS,
    FOLDER_FORMATS,
    FORMATS,
    GRAPH_FORMATS,
    INT8_OPSETS,
    INT8_TARGETS,
    OPSETS,
    RUNTIME_FORMATS,
    WEIGHT_ENDINGS,
    WEIGHT_FORMATS,
)
from repan_cli.config.files import read_file
from repan_cli.config.resolve import Resolved, data_given, typed
from repan_cli.config.schema import Layer
from repan_cli.config.settings import PREVIOUS, Config, baseline_phase, replace
from repan_cli.data import class_folders, datasets
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.runs.trackers import TRACKERS
from repan_cli.session import sources
from repan_cli.system.files import read_json, write_bytes, write_folder
from repan_cli.system.launcher import own_rank, restarts
from repan_cli.system.notices import warn
from repan_cli.system.packages import ONNX_PACKAGES, need, need_runtime
from repan_cli.system.user_code import names_a_file
from repan_cli.system.weight_files import file_in, no_checkpoint, split_key
from repan_cli.training.schedules import SCHEDULES

FORMS = ("conv", "conv-bn")


def check(module: str, *arguments: Any) -> None:
    """Raise InputError for arguments that a command cannot accept, given those of its `run`."""
    if module in CHECKS:
        CHECKS[module](*arguments)


# ---------------------------------------------------------------------------------------------- training


def _check_training(command: str, resolved: Resolved | str, given: Layer | None = None, *_: Any) -> None:
    """Check a new run by its settings, or the run that `--resume` names."""
    if isinstance(resolved, str):
        if own_rank() == 0:
            _check_unfinished(command, runs.find(command, resolved), given or {})
        return
    config = resolved.config
    if own_rank() == 0 and not restarts():
        runs.check_free(config.run.out)
    for name in config.run.trackers:
        TRACKERS[name]
    assert config.data.name is not None, "resolve has refused that"
    datasets.check(config.data.name, config.data.root)
    _check_network(config)
    for phase in (config, baseline_phase(config)):
        _check_phase(phase)
    asked = {**resolved.own, **resolved.given}
    cycles = command == "cycle"
    for text in (
        *unusual(config),
        *without_effect(config, asked, cycles=cycles),
        *longer(config, asked, cycles=cycles),
    ):
        warn(text)


def _check_unfinished(command: str, path: Path, given: Layer) -> None:
    """Raise InputError for a run that has all its results, unless more cycles are asked for."""
    is_series = (path / runs.SERIES).exists()
    if is_series or "cycle.count" in given or runs.state_of(path) != "done" or runs.command_of(path) != command:
        return
    try:
        settings, summary = typed(read_file(path / "config.yaml")), read_json(path / "summary.json")
    except InputError:  # the files of the run are checked later
        return
    made = len(summary.get("cycles", ()))  # more than in the settings, where more were asked for once
    more = max(made, settings.get("cycle.count", made)) if settings.get("cycle.schedule") == "restart" else None
    raise runs.is_finished(path, more if command == "cycle" else None)


def _check_dry_run(command: str, resolved: Resolved, *_: Any) -> None:
    """Check the settings of a dry run, whose run directory may exist."""
    config = replace(resolved.config, {"run.out": None})
    _check_training(command, dataclasses.replace(resolved, config=config))


def _check_network(config: Config) -> None:
    if config.model.name is not None:
        names.check_model(config.model.name)
    _check_weights(config.model.init)
    if config.block.name is not None:
        _check_block(config.block.name)


def _check_block(name: str) -> None:
    if not names_a_file(name):
        _check_known("block family", name, {**names.blocks(), **_registered_blocks()})
    elif not (path := Path(name.rpartition(":")[0])).is_file():
        raise InputError(f"no file {path} to load a block family from")


def _registered_blocks() -> dict[str, str]:
    """Return the block families that this process has registered, if it has loaded any."""
    families = getattr(sys.modules.get("repan_cli.blocks.families"), "FAMILIES", ())
    return dict.fromkeys(families, "")


def _check_phase(phase: Config) -> None:
    """Check what a phase of training names: schedule, optimizer, teacher."""
    SCHEDULES[phase.optim.schedule]
    known = names.optimizers()
    if known and phase.optim.name not in known:
        raise names.unknown_optimizer(phase.optim.name, list(known))
    teacher = phase.teacher
    if teacher.model is not None:
        names.check_model(teacher.model)
    if teacher.name in (None, PREVIOUS) or names.names_a_repository(teacher.name or ""):
        return
    assert teacher.name is not None, "which was looked at"
    if Path(split_key(teacher.name)[0]).exists():
        _check_weights(teacher.name)
    elif Path(teacher.name).suffix in WEIGHT_ENDINGS:
        raise InputError(f"no file {teacher.name} for the teacher")
    else:
        names.check_model(teacher.name)


def _check_weights(source: str | None) -> None:
    if source is None or names.names_a_repository(source):
        return
    path = split_key(source)[0]
    if not path.exists():
        raise InputError(no_checkpoint(path))
    sources.check(source)


def _check_known(kind: str, name: str, known: Mapping[str, str]) -> None:
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise InputError(f"unknown {kind} '{name}'{hint}")


# ---------------------------------------------------------------------------------------------- networks and files


def _check_info(options: InfoOptions) -> None:
    if not names.names_a_repository(options.checkpoint):
        info_source(options.checkpoint)
    if options.model is not None:
        names.check_model(options.model)


def info_source(source: str) -> tuple[Path, str | None]:
    """Return the file to describe, and the key in it. Raises InputError for a file that holds no network."""
    plain, key = split_key(source)
    path = sources.file_of(str(plain))
    if path is None:
        known = any(source.removeprefix("timm:") in each for each in (names.builtin(), names.of_timm(), names.ALIASES))
        raise InputError(f"no file {source}" + (f"; repan list models {source} lists networks" if known else ""))
    sources.check(str(path))
    return path, key


def _check_evaluate(options: EvaluateOptions) -> None:
    if options.out and options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is a file: name a folder for the tables")
    sources.check(options.checkpoint, options.model)
    _check_data(options.dataset, options.data_root)


def _check_data(name: str | None, root: str | None) -> None:
    """Check the data given by name or folder, and their location if it is known."""
    if name is None:
        return
    name, root = data_given(name, root)
    if root is not None and name != "folder":
        datasets.check(name, root)
    elif name != "folder":
        datasets.check_name(name)


def _check_predict(options: PredictOptions) -> None:
    if options.top < 1:
        raise InputError(f"--top must be at least 1, got {options.top}")
    for _ in images_in(options.images):
        pass
    sources.check(options.checkpoint, options.model)


def images_in(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the given images, and those in given folders, sorted. Raises InputError if there are none."""
    for path in paths:
        if path.is_dir():
            found = [file for file in class_folders.files_below(path) if class_folders.is_image(file)]
            if not found:
                raise InputError(f"{path} holds no images ({', '.join(sorted(class_folders.EXTENSIONS))})")
            yield from found
        elif path.exists():
            yield path
        else:
            raise InputError(f"no such image or folder: {path}")


BATCHES = (1, 32, 128)
"""The batch sizes of a benchmark, unless others are given."""


def batch_sizes(options: BenchmarkOptions) -> tuple[int, ...]:
    """Return the batch sizes to time. Raises InputError for text that is not a positive number."""
    words = [word.strip() for given in options.batches for word in given.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise InputError(f"--batch {word} is not a batch size: give whole numbers from 1, such as 1,32")
    return tuple(map(int, words)) or BATCHES


def _check_benchmark(options: BenchmarkOptions) -> None:
    batch_sizes(options)
    source = options.checkpoint
    if names.names_a_repository(source) or Path(source).exists() or Path(source).suffix in ARTIFACT_ENDINGS:
        sources.check(source, options.model)
    else:
        names.check_model(source)


# ---------------------------------------------------------------------------------------------- files to be written


def _check_fuse(options: FuseOptions) -> None:
    fuse_targets(options)
    sources.check(options.checkpoint, options.model)


Content = bytes | dict[str, bytes]
"""The content of a file, or the contents of a folder's files by name."""


@dataclass(frozen=True)
class Target:
    """A file, or a folder, to write in a format."""

    kind: str
    path: Path

    def write(self, content: Content, path: Path | None = None) -> None:
        """Write the content, or a copy of it at `path`."""
        if isinstance(content, dict):
            write_folder(path or self.path, content)
        else:
            write_bytes(path or self.path, content)


def fuse_targets(options: FuseOptions) -> list[Target]:
    """Return the targets of a merged network. Raises InputError for those that cannot be written."""
    path, out = Path(options.checkpoint), options.out
    if out and out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it")
    ending = out.suffix.removeprefix(".") if out else ""
    endings = tuple(part for given in options.formats for part in given.split(",")) or (ending or "pt",)
    for wanted in endings:
        if wanted not in FORMATS:
            hint = did_you_mean(wanted, FORMATS) or f"; choose {', '.join(FORMATS)}"
            raise InputError(f"cannot write the format '{wanted}'{hint}")
    if ending in FORMATS and ending not in endings:
        raise InputError(f"--out {out} ends in .{ending}, but --format is {', '.join(endings)}: make them agree")
    stem = out.with_suffix("") if out and ending in FORMATS else out or _default_stem(path)
    targets = [
        Target(wanted, stem.with_name(f"{stem.name}{'_' if wanted in FOLDER_FORMATS else '.'}{wanted}"))
        for wanted in dict.fromkeys(endings)
    ]
    for target in (each.path for each in targets):
        if target.resolve() == path.resolve():
            raise InputError(f"{target} is the checkpoint itself: give another --out")
        check_writable(target, overwrite=options.overwrite)
    _check_form({*endings}, options)
    return targets


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Raise InputError for a file that already exists, or whose folder cannot be made."""
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"no folder {target.parent} to write {target.name} into: {above} is a file")
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: give another --out, or --overwrite")


def _default_stem(path: Path) -> Path:
    if path.is_dir():
        return path / f"{file_in(path).stem}_fused"
    return path.with_name(f"{path.stem}_fused") if path.is_file() else Path(f"{path.name.rpartition(':')[2]}_fused")


def _check_form(endings: set[str], options: FuseOptions) -> None:
    form = options.form
    if form not in FORMS:
        raise InputError(f"--form {form} is not one of {', '.join(FORMS)}")
    if form == "conv-bn" and endings - set(WEIGHT_FORMATS):
        raise InputError("--form conv-bn writes weights, not a graph: use --format safetensors or pt")
    if options.half and endings != {"onnx"}:
        raise InputError("--half is for ONNX files: use --format onnx")
    if options.opset is not None and "onnx" not in endings:
        raise InputError("--opset is for ONNX files: use --format onnx")
    _check_opset(options.opset, OPSETS)
    if options.with_normalize and endings - {*GRAPH_FORMATS, *RUNTIME_FORMATS}:
        raise InputError("--with-normalize puts the normalization into a graph: use --format onnx or pt2")
    for kind in RUNTIME_FORMATS:
        if kind in endings:
            need_runtime(kind)
    if "onnx" in endings:
        need("writing ONNX", *ONNX_PACKAGES)


def _check_opset(opset: int | None, offered: range) -> None:
    if opset is not None and opset not in offered:
        raise InputError(f"--opset {opset} is not supported: choose from {offered[0]} to {offered[-1]}")


def _check_quantize(options: QuantizeOptions) -> None:
    quantize_target(options)
    sources.check(options.checkpoint, options.model)
    _check_data(options.dataset, options.data_root)


def quantize_target(options: QuantizeOptions) -> Path:
    """Return the file for an int8 network. Raises InputError if it cannot be written."""
    need("int8", *ONNX_PACKAGES)
    path = Path(options.checkpoint)
    folder, stem = (path, file_in(path).stem) if path.is_dir() else (path.parent, path.stem.rpartition(":")[2])
    target = options.out or folder / f"{stem}_int8.onnx"
    if target.suffix != ".onnx":
        raise InputError(f"--out {target}: int8 is written as ONNX, name a file that ends in .onnx")
    check_writable(target, overwrite=options.overwrite)
    _check_opset(options.opset, INT8_OPSETS)
    if options.images < 1:
        raise InputError(f"--images must be at least 1, got {options.images}")
    if options.target not in INT8_TARGETS:
        hint = did_you_mean(options.target, INT8_TARGETS)
        raise InputError(f"--target {options.target} is not one of {', '.join(INT8_TARGETS)}{hint}")
    if options.target == "openvino":
        need_runtime("openvino")
    if options.max_drop is not None and not options.max_drop >= 0:
        raise InputError(f"--max-drop must be at least 0 points of top-1 accuracy, got {options.max_drop:g}")
    return target


CHECKS: dict[str, Callable[..., None]] = {
    "train": _check_training,
    "series": _check_training,
    "dry_run": _check_dry_run,
    "info": _check_info,
    "evaluate": _check_evaluate,
    "predict": _check_predict,
    "benchmark": _check_benchmark,
    "fuse": _check_fuse,
    "quantize": _check_quantize,
}
