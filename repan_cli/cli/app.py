"""The command line: options, help, and errors to exit codes. Light: torch is imported inside commands only."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

import repan_cli
from repan_cli import config
from repan_cli.cli import completion
from repan_cli.cli.options import (
    SHORTCUTS,
    BlockOption,
    DataOption,
    JsonOption,
    MachineOption,
    NetworkOption,
    OverwriteOption,
    PlaceOption,
    SplitOption,
    SubjectArgument,
    of_training,
)
from repan_cli.config.conventions import SPLITS
from repan_cli.errors import FULL, InputError, OutOfSpaceError, RepanError, is_out_of_memory
from repan_cli.registry import did_you_mean

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

WITHOUT_TORCH = ("list_names", "version", "compare")
"""Modules of commands that start at once."""

HELP_STYLES = {
    "STYLE_OPTION": "bold",
    "STYLE_SWITCH": "bold",
    "STYLE_COMMANDS_TABLE_FIRST_COLUMN": "bold",
    "STYLE_USAGE": "bold",
    "STYLE_TYPES": "magenta",
    "STYLE_METAVAR": "magenta",
    "STYLE_HELPTEXT": "",
    "STYLE_OPTION_DEFAULT": "",
    "STYLE_REQUIRED_LONG": "red",
}
"""Typer's help in yellow, cyan and dim grey cannot be read on white."""


def _dispatch(module: str, *arguments: Any, entry: str = "run", **options: Any) -> None:
    """Import a command's module and run it; an error becomes its lines on stderr and its exit code."""
    try:
        importlib.import_module("repan_cli.display.console").show_notices()
        with _loading(module):
            command = importlib.import_module(f"repan_cli.commands.{module}")
        getattr(command, entry)(*arguments, **options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        _fail(error)


@contextlib.contextmanager
def _loading(module: str) -> Iterator[None]:
    """Say on a terminal what takes the first seconds, and take it back."""
    waits = module not in WITHOUT_TORCH and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if waits:
        print("loading PyTorch ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if waits:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _fail(error: Exception) -> None:
    """Say what went wrong in a line and leave with its exit code; what nobody foresaw keeps its traceback."""
    known = _as_known(error)
    if known is None or os.environ.get("REPAN_DEBUG") == "1":
        raise error
    rank = os.environ.get("RANK", "0")
    for line in str(known).splitlines():
        print(f"Error{f' of rank {rank}' if rank != '0' else ''}: {line}", file=sys.stderr)
    raise typer.Exit(known.exit_code) from None


def _as_known(error: Exception) -> RepanError | None:
    if isinstance(error, RepanError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        return OutOfSpaceError(
            f"no space left to write {error.filename or 'a file of the run'}; free some, or give another --out"
        )
    if is_out_of_memory(error):
        return OutOfSpaceError(
            "out of memory; set a smaller --batch-size (with as much more of optim.accumulate), or data.image_size"
        )
    return None


def _train(
    command: str,
    *,
    config_file: str | None,
    settings: list[str] | None,
    resume: str | None,
    seeds: str | None,
    control: bool = False,
    print_config: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    try:
        given = config.parse_assignments(settings or [])
        for name, value in options.items():
            if value in (None, False):
                continue
            if SHORTCUTS[name] in given:
                raise InputError(f"--{name.replace('_', '-')} and {SHORTCUTS[name]}= are the same setting: give one")
            given[SHORTCUTS[name]] = str(value)
        if resume is not None:
            others = {"--print-config": print_config, "--dry-run": dry_run, "--seeds": seeds, "--control": control}
            _check_resume(given, {"-c": config_file, **others})
        else:
            numbers = _seeds(seeds, given)
            resolved = config.resolve(command, config_file, given)
            if _begun_anew(resolved.config.run.out):
                resume, given = resolved.config.run.out, {}
    except RepanError as error:
        _fail(error)
    if resume is not None:
        _dispatch("study", command, resume, given, entry="go_on", as_json=as_json)
    elif print_config:
        print(config.dump(resolved.config, cycles=command == "cycle"), end="")
    elif dry_run:
        _dispatch("dry_run", command, resolved, runs=max(len(numbers), 1) * (1 + control), as_json=as_json)
    elif numbers or control:
        numbers = numbers or (resolved.config.run.seed,)
        _dispatch("study", command, resolved, seeds=numbers, with_control=control, as_json=as_json)
    else:
        _dispatch("train", command, resolved, as_json=as_json)


def _seeds(text: str | None, given: dict[str, Any]) -> tuple[int, ...]:
    """The numbers in '0,1,2', of which the first is `given` as the seed. Raises InputError for what they are not."""
    if text is None:
        return ()
    if "run.seed" in given:
        raise InputError("--seed and --seeds both say which seeds: give one")
    try:
        numbers = tuple(config.SCHEMA["run.seed"].parse(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--seeds {text}: {error}; give numbers such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds {text}: a seed stands there twice")
    given["run.seed"] = str(numbers[0])
    return numbers


def _begun_anew(out: str | None) -> bool:
    """Whether torchrun begins this run again after it has lost a process: it then goes on."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if again and out is None:
        raise InputError("torchrun began anew, but the run is not known: give --out with --max-restarts")
    return again and Path(out).exists()


def _check_resume(given: dict[str, Any], others: dict[str, Any]) -> None:
    for option, there in others.items():
        if there:
            raise InputError(f"{option} does not go with --resume: the run has its settings")
    if "run.out" in given:
        raise InputError("--out does not go with --resume: the run goes on in its own directory")


def _version(context: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    if context.params.get("verbose"):
        _dispatch("version")
    else:
        print(f"repan {repan_cli.__version__}")
    raise typer.Exit


@app.callback()
def repan(
    verbose: Annotated[
        bool, typer.Option("-v", is_eager=True, help="With --version: packages and machine, for bug reports.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version and stop.")] = False,
) -> None:
    """RepAn: train re-parameterizable networks in annealing cycles, then merge them into plain, fast ones."""
    if verbose:
        _fail(InputError("-v belongs to --version: 'repan --version -v' prints packages and machine"))


TRAINING = {
    "cycle": """Train by RepAn: a baseline, then cycles of merging, regrowing and training on.

    Examples:

    [bold]repan cycle --model repvgg --dataset digits[/bold]

    [bold]repan cycle --model repvgg --dataset cifar100 --cycles 5 --epochs 20 --seed 1[/bold]

    [bold]repan cycle --init runs/train/NAME/best.pt --dataset cifar100 cycle.rule=running[/bold]
    """,
    "train": """Train a network plainly: one learning-rate schedule, no restart.

    Examples:

    [bold]repan train --model repvgg --dataset cifar100 --epochs 100[/bold]

    [bold]repan train --model repvgg_a0_cifar --block acb --dataset folder --data-root photos data.image_size=64[/bold]
    """,
    "distill": """Train a network with a teacher: one learning-rate schedule, no restart.

    Examples:

    [bold]repan distill --model repvgg --dataset cifar100 --teacher runs/train/NAME/best.pt[/bold]

    [bold]repan distill --model repvgg --dataset cifar100 --teacher runs/train/NAME/best.pt teacher.alpha=0.9[/bold]
    """,
}
"""The commands that train, and their help."""


def _add_training(command: str, text: str) -> None:
    """A command whose parameters are those of `of_training`: Typer reads them from the signature."""

    def training(**given: Any) -> None:
        _train(command, **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(option), annotation=option)
        for name, option in of_training(command).items()
    ]
    training.__signature__ = inspect.Signature(parameters)
    training.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    training.__doc__ = text
    app.command(command, rich_help_panel="Training")(training)


def _default(option: Any) -> bool | None:
    return False if get_args(option)[0] is bool else None


for _command, _text in TRAINING.items():
    _add_training(_command, _text)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        _fail(InputError(f"--split {split} is none of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}"))


@app.command(rich_help_panel="Deployment")
def fuse(
    checkpoint: SubjectArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to write; default CHECKPOINT_fused.pt beside it."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="pt, safetensors, onnx or pt2; several: -f pt -f onnx.",
            autocompletion=completion.completes(completion.formats),
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="FORM",
            help="conv; or conv-bn, which loads into the plain timm network.",
            autocompletion=completion.completes(completion.forms),
        ),
    ] = "conv",
    with_normalize: Annotated[
        bool, typer.Option("--with-normalize", help="Put the normalisation of images into the graph.")
    ] = False,
    model: NetworkOption = None,
    data_root: Annotated[
        str | None, typer.Option("--data-root", metavar="FOLDER", help="Where its data lie, to compare on real images.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge a trained network into plain convolutions, prove it equal, write it.

    Examples:

    [bold]repan fuse checkpoint.pt[/bold]

    [bold]repan fuse runs/cycle/NAME/best.pt --format onnx --format pt2 --with-normalize[/bold]

    [bold]repan fuse timm:repvgg_a0 --format safetensors[/bold]
    """
    _dispatch(
        "fuse",
        checkpoint,
        out=out,
        formats=formats or [],
        form=form,
        model=model,
        with_normalize=with_normalize,
        data_root=data_root,
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command(rich_help_panel="Deployment")
def quantize(
    checkpoint: SubjectArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to write; default CHECKPOINT_int8.onnx beside it."),
    ] = None,
    images: Annotated[int, typer.Option("--images", metavar="N", help="Training images to calibrate on.")] = 512,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="One scale for all weights of a layer, not one a channel.")
    ] = False,
    dataset: DataOption = None,
    data_root: PlaceOption = None,
    split: SplitOption = "test",
    model: NetworkOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an int8 network (ONNX Runtime), with its accuracy before and after, and the layers that suffer.

    Examples:

    [bold]repan quantize runs/cycle/NAME/fused.pt[/bold]

    [bold]repan quantize runs/cycle/NAME/best.pt --per-tensor --json[/bold]
    """
    _check_split(split)
    _dispatch(
        "quantize",
        checkpoint,
        out=out,
        images=images,
        per_tensor=per_tensor,
        dataset=dataset,
        data_root=data_root,
        split=split,
        model=model,
        overwrite=overwrite,
        as_json=as_json,
    )


@app.command(rich_help_panel="Deployment")
def predict(
    checkpoint: SubjectArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.", show_default=False)
    ],
    top: Annotated[int, typer.Option("--top", metavar="K", help="How many classes to name.")] = 5,
    model: NetworkOption = None,
    device: MachineOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Name the classes that a network sees in images.

    Examples:

    [bold]repan predict runs/cycle/NAME/fused.pt photo.jpg[/bold]

    [bold]repan predict fused.onnx photos --top 1 --json[/bold]
    """
    _dispatch("predict", checkpoint, images, top=top, model=model, device=device, as_json=as_json)


@app.command(rich_help_panel="Inspection")
def benchmark(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="MODEL|FILE", help="A network's name, or any file of one.", show_default=False),
    ],
    block: BlockOption = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", "-b", metavar="N", help="Images at once; default 1, 32 and 128.")
    ] = None,
    training_batch: Annotated[
        int, typer.Option("--training-batch", metavar="N", help="Images of a training step; 0 leaves it out.")
    ] = 128,
    image_size: Annotated[
        int | None, typer.Option("--image-size", metavar="N", help="Side of the images; default the network's own.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="For each figure.")] = 2.0,
    precision: Annotated[str, typer.Option("--precision", metavar="P", help="fp32, bf16, fp16 or auto.")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile, too.")] = False,
    model: NetworkOption = None,
    device: MachineOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time a network: multi-branch, fused, compiled, ONNX Runtime, and a step of training, all in turns.

    Examples:

    [bold]repan benchmark repvgg[/bold]

    [bold]repan benchmark resnet50 --block dbb --image-size 224 --batch 1 --batch 16[/bold]

    [bold]repan benchmark runs/cycle/NAME/best.pt --compile --json[/bold]
    """
    _dispatch(
        "benchmark",
        checkpoint,
        block=block,
        batches=batches or [1, 32, 128],
        training_batch=training_batch,
        image_size=image_size,
        seconds=seconds,
        precision=precision,
        compiled=compiled,
        model=model,
        device=device,
        as_json=as_json,
    )


@app.command(rich_help_panel="Inspection")
def evaluate(
    checkpoint: SubjectArgument,
    dataset: DataOption = None,
    data_root: PlaceOption = None,
    split: SplitOption = "test",
    fused: Annotated[bool, typer.Option("--fused", help="Merge it, and show both forms side by side.")] = False,
    model: NetworkOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Write confusion.csv, .png and classes.csv.")
    ] = None,
    device: MachineOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how good a network is: multi-branch, fused, exported, or timm's.

    Examples:

    [bold]repan evaluate runs/cycle/NAME/best.pt --fused[/bold]

    [bold]repan evaluate plain.safetensors --split val --json[/bold]
    """
    _check_split(split)
    _dispatch(
        "evaluate",
        checkpoint,
        dataset=dataset,
        data_root=data_root,
        split=split,
        fused=fused,
        model=model,
        out=out,
        device=device,
        as_json=as_json,
    )


@app.command(rich_help_panel="Inspection")
def info(checkpoint: SubjectArgument, model: NetworkOption = None, as_json: JsonOption = False) -> None:
    """Show what is in a file: network, form, classes, figures, settings; of others' files what they tell.

    Example:

    [bold]repan info runs/cycle/NAME/fused.pt[/bold]
    """
    _dispatch("info", checkpoint, model=model, as_json=as_json)


@app.command(rich_help_panel="Inspection")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Run directories, folders with runs in them, globs.", show_default=False),
    ],
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="RUN",
            help="Compare with the group of this run, or of these; default: that without restarts, else the first. "
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    by_folder: Annotated[
        bool, typer.Option("--by-folder", help="Runs in one folder are a group of its name, not those set alike.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with curves.", show_default=False)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Also write the table as Markdown.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV on stdout.")] = False,
) -> None:
    """Compare runs: a mean and a spread over the seeds of each configuration, and how far it is from the control.

    Examples:

    [bold]repan compare runs/cycle/NAME[/bold]

    [bold]repan compare runs/cycle/* --html comparison.html[/bold]

    [bold]repan compare study --by-folder --control study/one_cosine --markdown study/results.md[/bold]
    """
    _dispatch(
        "compare",
        runs,
        control=control or [],
        by_folder=by_folder,
        as_json=as_json,
        as_csv=as_csv,
        html=html,
        markdown=markdown,
    )


@app.command("list", rich_help_panel="Inspection")
def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="models, blocks, datasets, optimizers, presets, schedules, settings or trackers.",
            show_default=False,
            autocompletion=completion.completes(completion.kinds),
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[GLOB]", help="Only names that match, such as 'optim.*'.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the names that can be typed: models, blocks, datasets, optimizers, presets, schedules, settings, trackers.

    Examples:

    [bold]repan list models[/bold]

    [bold]repan list settings 'cycle.*'[/bold]
    """
    _dispatch("list_names", kind, pattern, as_json=as_json)


def main() -> None:
    """The entry point of the `repan` command."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        styles = importlib.import_module("typer.rich_utils")
        for name, style in HELP_STYLES.items():
            setattr(styles, name, style)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of Click's errors of usage, wherever Typer has its Click from
            raise
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> int:
    """Say in a line what of the command line cannot be understood. Returns the exit code."""
    message = error.format_message().partition(" (Possible options")[0].replace("\n", " ").strip().rstrip(".?")
    if message:  # without arguments the help was shown already
        message = (message[0].lower() + message[1:]).replace(". Did you mean", "; did you mean")
        print(f"Error: {message}{_mend(error, message)}", file=sys.stderr)
    return error.exit_code


def _mend(error: Any, message: str) -> str:
    option = getattr(error, "option_name", None) or ""
    known = [info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands]
    command = next((word for word in sys.argv[1:] if word in known), None)
    if getattr(error, "possibilities", None) is not None and option.removeprefix("--").replace("-", "_") in SHORTCUTS:
        return f": it belongs to other commands than 'repan {command}', such as 'repan cycle'"
    hint = did_you_mean(option, getattr(error, "possibilities", None) or ())
    if hint or "did you mean" in message:
        return hint or "?"
    return f"; see 'repan {command} --help'" if command else "; see 'repan --help'"
