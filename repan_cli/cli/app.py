"""Define the command line: commands with their help, and usage errors. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Annotated, Any, NamedTuple

import typer

import repan_cli
from repan_cli.cli.dispatch import debugging, dispatch, fail, say_error
from repan_cli.cli.options import ReadableCommand, ReadableGroup, filled, signature_of
from repan_cli.cli.streams import accept_any_text, open_streams, say
from repan_cli.cli.training import train
from repan_cli.cli.usage import usage_errors
from repan_cli.cli.words import as_typed
from repan_cli.commands import options
from repan_cli.config.conventions import SPLITS
from repan_cli.errors import InputError, RepanError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import shown

app = typer.Typer(
    cls=ReadableGroup,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
"""Typer's help in yellow, cyan and dim gray cannot be read on white."""


def _version(context: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    if context.params.get("verbose"):
        dispatch("version")
    else:
        print(f"repan {repan_cli.__version__}")
    raise typer.Exit


@app.callback()
def repan(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", is_eager=True, help="With --version: print packages and machine, for bug reports.")
    ] = False,
) -> None:
    """RepAn: train re-parameterizable networks in annealing cycles, then merge them into plain, fast ones."""
    if verbose:
        fail(InputError("-v belongs to --version: 'repan --version -v' prints packages and machine"))


class Command(NamedTuple):
    """A command: its options, its help, the panel that lists it, and the module that runs it."""

    options: type
    help: str
    panel: str
    module: str = ""


COMMANDS = {
    "cycle": Command(
        options.CycleOptions,
        """Train with RepAn: a baseline, then cycles that each begin by merging the branches and growing new ones.

    Examples:

    [bold]repan cycle --model repvgg --dataset digits[/bold]

    [bold]repan cycle --model repvgg --dataset cifar100 --baseline-epochs 40 --cycles 5 --epochs 20[/bold]

    [bold]repan cycle --init runs/train/NAME/best.pt --dataset cifar100 cycle.rule=running[/bold]
    """,
        "Training",
    ),
    "train": Command(
        options.TrainOptions,
        """Train a network without restarts, with one learning-rate schedule.

    Examples:

    [bold]repan train --model repvgg --dataset cifar100 --epochs 100[/bold]

    [bold]repan train --model repvgg_a0_cifar --block acb --dataset folder --data-root photos data.image_size=64[/bold]
    """,
        "Training",
    ),
    "distill": Command(
        options.TrainOptions,
        """Train a network with a teacher, without restarts.

    Examples:

    [bold]repan distill --model repvgg --dataset cifar100 --teacher runs/train/NAME/best.pt[/bold]

    [bold]repan distill --model repvgg --dataset cifar100 --teacher runs/train/NAME/best.pt teacher.alpha=0.9[/bold]
    """,
        "Training",
    ),
    "fuse": Command(
        options.FuseOptions,
        """Merge a trained network into plain convolutions, check that it computes the same, and write it.

    Examples:

    [bold]repan fuse checkpoint.pt[/bold]

    [bold]repan fuse runs/cycle/NAME/best.pt --format onnx --format pt2 --with-normalize[/bold]

    [bold]repan fuse timm:repvgg_a0 --format safetensors[/bold]
    """,
        "Deployment",
        "fuse",
    ),
    "quantize": Command(
        options.QuantizeOptions,
        """Quantize a network to int8, and show its accuracy before and after, and the layers that lose most precision.

    Examples:

    [bold]repan quantize runs/cycle/NAME/fused.pt[/bold]

    [bold]repan quantize runs/cycle/NAME/best.pt --per-tensor --json[/bold]
    """,
        "Deployment",
        "quantize",
    ),
    "push": Command(
        options.PushOptions,
        """Upload a folder written by 'repan fuse --format timm' to the Hugging Face Hub.

    Examples:

    [bold]repan push plain_timm someone/my-network[/bold]

    [bold]repan push plain_timm someone/my-network --private --json[/bold]
    """,
        "Deployment",
        "push",
    ),
    "predict": Command(
        options.PredictOptions,
        """Classify images with a network.

    Examples:

    [bold]repan predict runs/cycle/NAME/fused.pt photo.jpg[/bold]

    [bold]repan predict fused.onnx photos --top 1 --json[/bold]
    """,
        "Deployment",
        "predict",
    ),
    "benchmark": Command(
        options.BenchmarkOptions,
        """Time a network: multi-branch, fused, compiled, ONNX Runtime, OpenVINO, and a training step.

    Examples:

    [bold]repan benchmark repvgg[/bold]

    [bold]repan benchmark resnet50 --block dbb --image-size 224 --batch 1 --batch 16[/bold]

    [bold]repan benchmark runs/cycle/NAME/best.pt --compile --json[/bold]
    """,
        "Inspection",
        "benchmark",
    ),
    "evaluate": Command(
        options.EvaluateOptions,
        """Measure the accuracy of a network: multi-branch, fused, exported, or timm's.

    Examples:

    [bold]repan evaluate runs/cycle/NAME/best.pt --fused[/bold]

    [bold]repan evaluate plain.safetensors --split val --json[/bold]
    """,
        "Inspection",
        "evaluate",
    ),
    "info": Command(
        options.InfoOptions,
        """Show what a file holds: network, form, classes, results, settings. Works for files of other programs, too.

    Example:

    [bold]repan info runs/cycle/NAME/fused.pt[/bold]
    """,
        "Inspection",
        "info",
    ),
    "compare": Command(
        options.CompareOptions,
        """Compare runs: mean and spread over seeds of each configuration, and its difference from the control.

    Examples:

    [bold]repan compare runs/cycle/NAME[/bold]

    [bold]repan compare runs/cycle/* --html comparison.html[/bold]

    [bold]repan compare study --by-folder --control study/one_cosine --markdown study/results.md[/bold]
    """,
        "Inspection",
        "compare",
    ),
    "study": Command(
        options.StudyOptions,
        """Run an experiment: every arm of a grid with every seed, then a table that compares them.

    Run the same command again to continue stopped runs; finished runs are kept.

    Examples:

    [bold]repan study small --dry-run[/bold]

    [bold]repan study small --arms 'one_cosine,continuous_*' --jobs 2 --minutes 60[/bold]

    [bold]repan study my_grid.yaml --out study --seeds 0,1,2,3,4 --device cuda:0,cuda:1[/bold]
    """,
        "Training",
        "study",
    ),
    "list": Command(
        options.ListOptions,
        """List available names: models, blocks, datasets, optimizers, presets and more.

    Examples:

    [bold]repan list models[/bold]

    [bold]repan list settings 'cycle.*'[/bold]

    [bold]repan list runs[/bold]
    """,
        "Inspection",
        "list_names",
    ),
}


def _add(name: str, command: Command) -> None:
    """Add a command to the app: Typer reads its parameters from the signature."""

    def run(**given: Any) -> None:
        chosen = filled(command.options, given)
        if not command.module:
            train(name, chosen)
            return
        _check_split(chosen)
        dispatch(command.module, chosen)

    signature = signature_of(command.options)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    run.__doc__ = command.help
    app.command(name, cls=ReadableCommand, rich_help_panel=command.panel)(run)


for _name, _command in COMMANDS.items():
    _add(_name, _command)


def _check_split(chosen: Any) -> None:
    split = getattr(chosen, "split", None)
    if split is not None and split not in SPLITS:
        fail(InputError(f"--split {split} is not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}"))


def main() -> None:
    """Run the `repan` command."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reports to its makers, and warns if it cannot
    if sys.argv[1:2] == ["help"]:
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        styles = importlib.import_module("typer.rich_utils")
        for name, style in HELP_STYLES.items():
            setattr(styles, name, style)
    open_streams()
    _refuse_unreadable_words()
    try:
        code = app(as_typed(sys.argv[1:]), standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:  # the reader of stdout has seen enough: then rich exits
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RepanError as error:  # an error of stdout itself: all others were printed
        if debugging():
            raise
        say(f"Error: {error}")
        code = error.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of Click, from whichever package Typer takes Click
            raise
        code = _usage(error)
    code = code if isinstance(code, int) else 0
    _leave_children(code)
    sys.exit(code)


def _leave_children(code: int) -> None:
    """Exit at once if a child cannot be ended, such as one that waits for a disk. Python would wait for it."""
    if "multiprocessing" not in sys.modules:
        return
    children = importlib.import_module("multiprocessing").active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(5)
    if any(child.is_alive() for child in children):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _refuse_unreadable_words() -> None:
    """Exit with an error for names that are not UTF-8, since they cannot be written to a file."""
    accept_any_text()
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            print(f"Error: '{shown(word)}' is not UTF-8 text: rename the file or folder", file=sys.stderr)
            sys.exit(InputError.exit_code)


def _usage(error: Any) -> int:
    """Explain a command line that cannot be understood, in a line for each fault; return the exit code."""
    with contextlib.suppress(OSError):  # stderr may be closed
        for line in usage_errors(error, {name: command.options for name, command in COMMANDS.items()}):
            say_error(shown(line))
    return error.exit_code
