"""The options and arguments of the commands, each declared once: its name, its help, what Tab offers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from repan_cli import config
from repan_cli.cli import completion

SHORTCUTS = {
    "model": "model.name",
    "block": "block.name",
    "dataset": "data.name",
    "data_root": "data.root",
    "epochs": "epochs",
    "lr": "optim.lr",
    "batch_size": "data.batch_size",
    "baseline_epochs": "baseline.epochs",
    "baseline_lr": "baseline.optim.lr",
    "cycles": "cycle.count",
    "init": "model.init",
    "pretrained": "model.pretrained",
    "teacher": "teacher.name",
    "seed": "run.seed",
    "device": "run.device",
    "out": "run.out",
}
"""Which setting an option stands for."""


def shortcut(name: str, metavar: str, text: str | None = None) -> Any:
    key = SHORTCUTS[name]
    declared = config.SCHEMA.get(key) or config.OVERLAY[key]
    flags = [f"--{name.replace('_', '-')}", *{"model": ["-m"], "dataset": ["-d"], "out": ["-o"]}.get(name, [])]
    offers = completion.of_setting(key)
    return typer.Option(
        *flags,
        metavar=metavar,
        help=text or declared.text,
        show_default=False,
        autocompletion=offers,
        rich_help_panel=_panel(name),
    )


WHAT, HOW_LONG, RUN = "What is trained", "How long, how fast", "The run"


def _panel(name: str) -> str:
    """Under which heading of the help an option stands."""
    if name in ("model", "dataset", "block", "data_root", "init", "teacher"):
        return WHAT
    return RUN if name in ("seed", "device", "out") else HOW_LONG


BlockOption = Annotated[str | None, shortcut("block", "NAME")]
PretrainedOption = Annotated[
    bool,
    typer.Option("--pretrained", help="Start from the weights that timm or torchvision offers.", rich_help_panel=WHAT),
]
TeacherOption = Annotated[
    str | None, shortcut("teacher", "NAME", "A file of weights, timm:NAME, or in cycle 'previous'.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE",
        rich_help_panel=RUN,
        help="Settings from a YAML file or a preset (recipes/cifar); without it, the recipe of the data set.",
        autocompletion=completion.completes(completion.presets),
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", rich_help_panel=RUN, help="Print the settings as YAML and stop.")
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        rich_help_panel=RUN,
        help="Go on with a run: its directory, or 'latest'.",
        show_default=False,
        autocompletion=completion.completes(completion.runs),
    ),
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N,...",
        rich_help_panel=RUN,
        help="Run once with each of these seeds, and compare.",
        show_default=False,
    ),
]
ControlOption = Annotated[
    bool, typer.Option("--control", rich_help_panel=RUN, help="Also run the same without restarts, and compare.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", rich_help_panel=RUN, help="Try every part of the run once, say what it will be, write nothing."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Any other setting, such as optim.weight_decay=2e-4; see 'repan list settings'.",
        show_default=False,
        autocompletion=completion.words,
    ),
]


def of_training(command: str) -> dict[str, Any]:
    """The arguments of `train`, `distill` and `cycle` by name, in the order of their help. Switches are off, all others
    None, where they are not given.
    """
    cycles = command == "cycle"
    texts = CYCLE_TEXTS if cycles else RUN_TEXTS
    only = {"baseline_epochs": "N", "baseline_lr": "RATE", "cycles": "N"} if cycles else {}
    shared = {"model": "NAME", "dataset": "NAME", "block": "NAME", "data_root": "FOLDER", **only}
    shared |= {"epochs": "N", "lr": "RATE", "init": "FILE"}
    later = {"batch_size": "N", "seed": "N", "device": "NAME", "out": "FOLDER"}

    def shortcuts(metavars: dict[str, str]) -> dict[str, Any]:
        return {name: Annotated[str | None, shortcut(name, what, texts.get(name))] for name, what in metavars.items()}

    return {
        "settings": Settings,
        **shortcuts(shared),
        "pretrained": PretrainedOption,
        "teacher": TeacherOption,
        **shortcuts(later),
        "config_file": ConfigOption,
        "resume": ResumeOption,
        "seeds": SeedsOption,
        **({"control": ControlOption} if cycles else {}),
        "print_config": PrintConfigOption,
        "dry_run": DryRunOption,
        "as_json": JsonOption,
    }


RUN_TEXTS = {"epochs": "Length of the run.", "init": "Start from these weights."}
CYCLE_TEXTS = {
    "baseline_epochs": "Length of the baseline.",
    "baseline_lr": "Peak learning rate of the baseline.",
    "epochs": "Length of each cycle.",
    "lr": "Peak learning rate of each cycle.",
    "init": "Start the cycles from these weights instead of a baseline.",
}
"""What an option says where the text of its setting would not do."""


# ---------------------------------------------------------------------------------------------- files of networks

SubjectArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A file that repan wrote, a run's folder, others' weights (with --model), or timm:NAME.",
        show_default=False,
        autocompletion=completion.completes(completion.checkpoints),
    ),
]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", help="The network of others' weights, or your own, file.py:function."
    ),
]


MachineOption = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        "-d",
        metavar="NAME",
        help="Another data set than it was trained on.",
        autocompletion=completion.of_setting("data.name"),
    ),
]
PlaceOption = Annotated[
    str | None, typer.Option("--data-root", metavar="FOLDER", help="Folder of the data sets, where it has moved.")
]
SplitOption = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="PART",
        help="test, val or train.",
        autocompletion=completion.completes(completion.splits),
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
