"""The options and arguments of the commands, each declared once: its name, its help, what Tab offers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from repan_cli import completion, config

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
    return typer.Option(*flags, metavar=metavar, help=text or declared.text, show_default=False, autocompletion=offers)


ModelOption = Annotated[str | None, shortcut("model", "NAME")]
BlockOption = Annotated[str | None, shortcut("block", "NAME")]
DatasetOption = Annotated[str | None, shortcut("dataset", "NAME")]
DataRootOption = Annotated[str | None, shortcut("data_root", "FOLDER")]
EpochsOption = Annotated[str | None, shortcut("epochs", "N", "Length of the run.")]
LrOption = Annotated[str | None, shortcut("lr", "RATE")]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Start from the weights that timm or torchvision offers.")
]
BatchSizeOption = Annotated[str | None, shortcut("batch_size", "N")]
TeacherOption = Annotated[
    str | None, shortcut("teacher", "NAME", "A file of weights, timm:NAME, or in cycle 'previous'.")
]
SeedOption = Annotated[str | None, shortcut("seed", "N")]
DeviceOption = Annotated[str | None, shortcut("device", "NAME")]
OutOption = Annotated[str | None, shortcut("out", "FOLDER")]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE",
        help="Settings from a YAML file or a preset (recipes/cifar); without it, the recipe of the data set.",
        autocompletion=completion.completes(completion.presets),
    ),
]
PrintConfigOption = Annotated[bool, typer.Option("--print-config", help="Print the settings as YAML and stop.")]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Go on with a run: its directory, or 'latest'.",
        show_default=False,
        autocompletion=completion.completes(completion.runs),
    ),
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds", metavar="N,N,...", help="Run once with each of these seeds, and compare.", show_default=False
    ),
]
ControlOption = Annotated[bool, typer.Option("--control", help="Also run the same without restarts, and compare.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Try every part of the run once, say what it will be, write nothing.")
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
