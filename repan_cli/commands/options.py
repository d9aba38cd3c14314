"""Declare the options of every command, each once: name, help, completion, default. Imports neither torch nor Typer.

A command takes one frozen dataclass of its options. `cli` makes a Typer command of each. Callers from Python fill the
same dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from repan_cli.commands.declaration import Argument, Option
from repan_cli.config.grid import grids

WHAT, HOW_LONG, RUN = "Model and data", "Length and learning rate (default: the recipe of the data set)", "The run"
"""Headings under which the help of the training commands lists options."""


# ---------------------------------------------------------------------------------------------- shared

Checkpoint = Annotated[
    str,
    Argument(
        "CHECKPOINT",
        "A file written by repan, a run's folder, other weights (with --model), or timm:NAME.",
        "checkpoints",
    ),
]
Network = Annotated[
    str | None,
    Option(("--model", "-m"), "Network of another program's weights, or your own as file.py:function.", "NAME"),
]
OwnBlock = Annotated[
    str | None, Option(("--block",), "Your own block family, if the network uses one: file.py:function.", "NAME")
]
Device = Annotated[str, Option(("--device",), "auto, cpu, cuda or cuda:N.", "NAME")]
DatasetName = Annotated[
    str | None, Option(("--dataset", "-d"), "Data set, if not the one it was trained on.", "NAME", setting="data.name")
]
DataRoot = Annotated[str | None, Option(("--data-root",), "Folder of the data sets, if it has moved.", "FOLDER")]
ClassOrder = Annotated[
    str | None,
    Option(("--classes",), "Class order of image folders: text, natural, or a file with one name per line.", "FILE"),
]
Split = Annotated[str, Option(("--split",), "Part of the data: test, val or train.", "PART", "splits")]
TrustCode = Annotated[bool, Option(("--trust-code",), "Run the code in a TorchScript file.")]
Overwrite = Annotated[bool, Option(("--overwrite",), "Replace existing files.")]
AS_JSON = "Print the result as JSON on stdout."
AsJson = Annotated[bool, Option(("--json",), AS_JSON)]
Opset = Annotated[int | None, Option(("--opset",), "ONNX operator set version, for older runtimes; default 18.", "N")]
Block = Annotated[str | None, Option(("--block",), metavar="NAME", setting="block.name", panel=WHAT)]


# ---------------------------------------------------------------------------------------------- deployment


@dataclass(frozen=True)
class FuseOptions:
    """Options of `repan fuse`."""

    checkpoint: Checkpoint
    out: Annotated[
        Path | None, Option(("--out", "-o"), "Output file; default CHECKPOINT_fused.pt next to it.", "FILE")
    ] = None
    formats: Annotated[
        tuple[str, ...],
        Option(
            ("--format", "-f"),
            "pt, safetensors, onnx, pt2, timm, torchscript, openvino, ncnn, tflite or coreml; several: pt,onnx.",
            "FORMAT,...",
            "formats",
        ),
    ] = ()
    form: Annotated[
        str, Option(("--form",), "conv, or conv-bn: with BN, as the plain network has it.", "FORM", "forms")
    ] = "conv"
    with_normalize: Annotated[
        bool, Option(("--with-normalize",), "Normalize within the graph, which then takes values from 0 to 1.")
    ] = False
    unproven: Annotated[bool, Option(("--unproven",), "Also write files that cannot be verified (Core ML).")] = False
    half: Annotated[bool, Option(("--half",), "Write the ONNX file in float16, and measure the cost.")] = False
    opset: Opset = None
    model: Network = None
    block: OwnBlock = None
    data_root: Annotated[
        str | None, Option(("--data-root",), "Folder of the data sets, to compare on real images.", "FOLDER")
    ] = None
    overwrite: Overwrite = False
    as_json: AsJson = False


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `repan quantize`."""

    checkpoint: Checkpoint
    out: Annotated[
        Path | None, Option(("--out", "-o"), "Output file; default CHECKPOINT_int8.onnx next to it.", "FILE")
    ] = None
    images: Annotated[int, Option(("--images",), "Number of training images for calibration.", "N")] = 512
    per_tensor: Annotated[bool, Option(("--per-tensor",), "One weight scale per layer instead of one per channel.")] = (
        False
    )
    target: Annotated[
        str, Option(("--target",), "ort (ONNX Runtime), tensorrt or openvino.", "PROGRAM", "int8_targets")
    ] = "ort"
    max_drop: Annotated[
        float | None, Option(("--max-drop",), "Keep layers in float32 until top-1 falls by at most POINTS.", "POINTS")
    ] = None
    opset: Opset = None
    dataset: DatasetName = None
    data_root: DataRoot = None
    split: Split = "test"
    classes: ClassOrder = None
    model: Network = None
    block: OwnBlock = None
    overwrite: Overwrite = False
    as_json: AsJson = False


@dataclass(frozen=True)
class PushOptions:
    """Options of `repan push`."""

    folder: Annotated[Path, Argument("FOLDER", "Folder written by 'repan fuse --format timm'.")]
    name: Annotated[str, Argument("ORG/NAME", "Repository on the Hub.")]
    private: Annotated[bool, Option(("--private",), "Make a new repository private.")] = False
    as_json: AsJson = False


@dataclass(frozen=True)
class PredictOptions:
    """Options of `repan predict`."""

    checkpoint: Checkpoint
    images: Annotated[tuple[Path, ...], Argument("IMAGES...", "Image files, or folders of images.")]
    top: Annotated[int, Option(("--top",), "Number of classes to list.", "K")] = 5
    save: Annotated[
        Path | None, Option(("--save",), "Write the images with their classes below, and a table.", "FOLDER")
    ] = None
    model: Network = None
    block: OwnBlock = None
    trust_code: TrustCode = False
    device: Device = "auto"
    as_json: AsJson = False


# ---------------------------------------------------------------------------------------------- inspection


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of `repan benchmark`."""

    checkpoint: Annotated[str, Argument("MODEL|FILE", "Name of a network, or any file of one.")]
    block: Annotated[str | None, Option(("--block",), metavar="NAME", setting="block.name")] = None
    batches: Annotated[tuple[str, ...], Option(("--batch", "-b"), "Batch sizes; default 1,32,128.", "N,N,...")] = ()
    training_batch: Annotated[int, Option(("--training-batch",), "Batch size of a training step; 0 skips it.", "N")] = (
        128
    )
    image_size: Annotated[
        int | None, Option(("--image-size",), "Image side in pixels; default the network's own.", "N")
    ] = None
    seconds: Annotated[float, Option(("--seconds",), "Seconds of measurement for each result.", "S")] = 2.0
    precision: Annotated[str, Option(("--precision",), "Precision: fp32, bf16, fp16 or auto.", "P")] = "fp32"
    compiled: Annotated[bool, Option(("--compile",), "Also time torch.compile.")] = False
    model: Network = None
    trust_code: TrustCode = False
    device: Device = "auto"
    as_json: AsJson = False


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `repan evaluate`."""

    checkpoint: Checkpoint
    dataset: DatasetName = None
    data_root: DataRoot = None
    split: Split = "test"
    classes: ClassOrder = None
    fused: Annotated[bool, Option(("--fused",), "Also merge the network, and show both forms side by side.")] = False
    model: Network = None
    block: OwnBlock = None
    out: Annotated[
        Path | None,
        Option(("--out", "-o"), "Write or replace confusion.csv, confusion.png and classes.csv there.", "FOLDER"),
    ] = None
    trust_code: TrustCode = False
    device: Device = "auto"
    as_json: AsJson = False


@dataclass(frozen=True)
class InfoOptions:
    """Options of `repan info`."""

    checkpoint: Checkpoint
    model: Network = None
    block: OwnBlock = None
    as_json: AsJson = False


@dataclass(frozen=True)
class CompareOptions:
    """Options of `repan compare`."""

    runs: Annotated[tuple[str, ...], Argument("RUN", "Run directories, run records, folders of these, or globs.")]
    control: Annotated[
        tuple[str, ...],
        Option(
            ("--control",),
            "Compare with the group of this run; default: the group without restarts, else the first. Repeatable.",
            "RUN",
        ),
    ] = ()
    by_folder: Annotated[bool, Option(("--by-folder",), "Group runs by their folder instead of by their settings.")] = (
        False
    )
    html: Annotated[Path | None, Option(("--html",), "Also write an HTML page with curves.", "FILE")] = None
    markdown: Annotated[Path | None, Option(("--markdown",), "Also write the table as Markdown.", "FILE")] = None
    records: Annotated[Path | None, Option(("--records",), "Also write a small record of each run.", "FOLDER")] = None
    as_json: AsJson = False
    as_csv: Annotated[bool, Option(("--csv",), "Print the table as CSV on stdout.")] = False


@dataclass(frozen=True)
class StudyOptions:
    """Options of `repan study`."""

    grid: Annotated[str, Argument("GRID", f"A YAML file of arms, or a built-in grid: {', '.join(grids())}.", "grids")]
    settings: Annotated[
        tuple[str, ...], Argument("[KEY=VALUE]...", "Settings of every arm; they override the grid's.", "words")
    ] = ()
    out: Annotated[Path | None, Option(("--out", "-o"), "Study folder; default runs/study/GRID.", "FOLDER")] = None
    arms: Annotated[str, Option(("--arms",), "Run only arms whose names match, comma-separated.", "GLOB,...")] = "*"
    seeds: Annotated[str | None, Option(("--seeds",), "Seeds, instead of the grid's.", "N,N,...")] = None
    jobs: Annotated[int | None, Option(("--jobs", "-j"), "Parallel runs; default: one per device.", "N")] = None
    minutes: Annotated[float | None, Option(("--minutes",), "Save and stop after this many minutes.", "M")] = None
    data_root: Annotated[str | None, Option(("--data-root",), metavar="FOLDER", setting="data.root")] = None
    device: Annotated[str | None, Option(("--device",), "cpu, cuda, or several: cuda:0,cuda:1.", "NAME,...")] = None
    dry_run: Annotated[bool, Option(("--dry-run",), "Show the arms and their progress; start nothing.")] = False
    as_json: AsJson = False


@dataclass(frozen=True)
class ListOptions:
    """Options of `repan list`."""

    kind: Annotated[
        str,
        Argument(
            "KIND",
            "models, blocks, datasets, optimizers, presets, runs, schedules, settings, studies or trackers.",
            "kinds",
        ),
    ]
    pattern: Annotated[
        str | None, Argument("[GLOB]", "List only matching names, such as 'optim.*'; for runs, a folder.")
    ] = None
    as_json: AsJson = False


# ---------------------------------------------------------------------------------------------- training

Settings = Annotated[
    tuple[str, ...],
    Argument(
        "[KEY=VALUE]...", "Any other setting, such as optim.weight_decay=2e-4; see 'repan list settings'.", "words"
    ),
]
Model = Annotated[str | None, Option(("--model", "-m"), metavar="NAME", setting="model.name", panel=WHAT)]
Dataset = Annotated[str | None, Option(("--dataset", "-d"), metavar="NAME", setting="data.name", panel=WHAT)]
Root = Annotated[str | None, Option(("--data-root",), metavar="FOLDER", setting="data.root", panel=WHAT)]
EPOCHS_OF_CYCLES = "Epochs of each cycle. Recipes give the baseline its own: --baseline-epochs."
RATE_OF_CYCLES = "Peak learning rate; if the baseline has its own (--baseline-lr), only that of the cycles."
RATE_OF_ALL = "Peak learning rate of the baseline, and with one schedule over all (the default) of the cycles."
Rate = Annotated[str | None, Option(("--lr",), metavar="RATE", setting="optim.lr", panel=HOW_LONG)]
Epochs = Annotated[str | None, Option(("--epochs",), "Number of epochs.", "N", setting="epochs", panel=HOW_LONG)]
Init = Annotated[str | None, Option(("--init",), "Start from these weights.", "FILE", setting="model.init", panel=WHAT)]
Pretrained = Annotated[
    bool,
    Option(
        ("--pretrained",),
        "Start from the pretrained weights of timm or torchvision.",
        setting="model.pretrained",
        panel=WHAT,
    ),
]
Teacher = Annotated[
    str | None,
    Option(("--teacher",), "A file of weights, a run, or timm:NAME.", "NAME", setting="teacher.name", panel=WHAT),
]
TEACHER_OF_CYCLES = "A file of weights, a run, timm:NAME, or 'previous': the merged network of the cycle before."
BatchSize = Annotated[str | None, Option(("--batch-size",), metavar="N", setting="data.batch_size", panel=HOW_LONG)]
Seed = Annotated[str | None, Option(("--seed",), metavar="N", setting="run.seed", panel=RUN)]
RunDevice = Annotated[str | None, Option(("--device",), metavar="NAME", setting="run.device", panel=RUN)]
Out = Annotated[str | None, Option(("--out", "-o"), metavar="FOLDER", setting="run.out", panel=RUN)]
ConfigFile = Annotated[
    str | None,
    Option(
        ("--config", "-c"),
        "Settings from a YAML file or preset (recipes/cifar); default: the recipe of the data set.",
        "FILE",
        "presets",
        panel=RUN,
    ),
]
Resume = Annotated[
    str | None, Option(("--resume",), "Resume a run: its directory, or 'latest'.", "RUN", "runs", panel=RUN)
]
Seeds = Annotated[
    str | None, Option(("--seeds",), "Train once with each of these seeds, and compare.", "N,N,...", panel=RUN)
]
Control = Annotated[bool, Option(("--control",), "Also train without restarts, and compare.", panel=RUN)]
RunAsJson = Annotated[bool, Option(("--json",), AS_JSON, panel=RUN)]
PrintConfig = Annotated[bool, Option(("--print-config",), "Print the settings as YAML and exit.", panel=RUN)]
DryRun = Annotated[
    bool, Option(("--dry-run",), "Try every part of the run once, describe the run, write nothing.", panel=RUN)
]


@dataclass(frozen=True)
class TrainOptions:
    """Options of `repan train` and `repan distill`. Shortcuts hold the text that was typed, as settings do."""

    settings: Settings = ()
    model: Model = None
    dataset: Dataset = None
    block: Block = None
    data_root: Root = None
    epochs: Epochs = None
    lr: Rate = None
    init: Init = None
    pretrained: Pretrained = False
    teacher: Teacher = None
    batch_size: BatchSize = None
    seed: Seed = None
    device: RunDevice = None
    out: Out = None
    config_file: ConfigFile = None
    resume: Resume = None
    seeds: Seeds = None
    print_config: PrintConfig = False
    dry_run: DryRun = False
    as_json: RunAsJson = False


@dataclass(frozen=True)
class CycleOptions:
    """Options of `repan cycle`. Shortcuts hold the text that was typed, as settings do."""

    settings: Settings = ()
    model: Model = None
    dataset: Dataset = None
    block: Block = None
    data_root: Root = None
    baseline_epochs: Annotated[
        str | None,
        Option(("--baseline-epochs",), "Epochs of the baseline.", "N", setting="baseline.epochs", panel=HOW_LONG),
    ] = None
    baseline_lr: Annotated[
        str | None, Option(("--baseline-lr",), RATE_OF_ALL, "RATE", setting="baseline.optim.lr", panel=HOW_LONG)
    ] = None
    cycles: Annotated[str | None, Option(("--cycles",), metavar="N", setting="cycle.count", panel=HOW_LONG)] = None
    epochs: Annotated[str | None, Option(("--epochs",), EPOCHS_OF_CYCLES, "N", setting="epochs", panel=HOW_LONG)] = None
    lr: Annotated[str | None, Option(("--lr",), RATE_OF_CYCLES, "RATE", setting="optim.lr", panel=HOW_LONG)] = None
    init: Annotated[
        str | None,
        Option(
            ("--init",),
            "Start the cycles from these weights instead of a baseline.",
            "FILE",
            setting="model.init",
            panel=WHAT,
        ),
    ] = None
    pretrained: Pretrained = False
    teacher: Annotated[
        str | None, Option(("--teacher",), TEACHER_OF_CYCLES, "NAME", setting="teacher.name", panel=WHAT)
    ] = None
    batch_size: BatchSize = None
    seed: Seed = None
    device: RunDevice = None
    out: Out = None
    config_file: ConfigFile = None
    resume: Resume = None
    seeds: Seeds = None
    control: Control = False
    print_config: PrintConfig = False
    dry_run: DryRun = False
    as_json: RunAsJson = False
