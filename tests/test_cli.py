"""The commands as users type them: output, streams, exit codes, and messages for bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support import DIGITS, ROOT, one_line, repan, run, write_folders

import repan_cli
from repan_cli import checkpoint, config
from repan_cli.commands import version
from repan_cli.commands.declaration import Option, declared
from repan_cli.commands.options import CycleOptions
from repan_cli.display.plots import draw_curves
from repan_cli.training.plan import cycle_plan

pytestmark = pytest.mark.usefixtures("few_blocks")

# ---------------------------------------------------------------------------------------------- a whole run


def test_a_run_directory_holds_what_it_promises(small_run):
    names = {path.name for path in small_run.folder.iterdir()}
    files = (
        "config.yaml env.json metrics.jsonl metrics.csv summary.json status.json log.txt curves.png images.png .lock"
    )
    weights = "last.pt last_previous.pt best.pt fused.pt cycle_00.pt cycle_01.pt cycle_02.pt"
    assert names == {*files.split(), *weights.split(), "curves.png", "images.png"}
    assert json.loads((small_run.folder / "status.json").read_text())["state"] == "done"
    assert "torch" in json.loads((small_run.folder / "env.json").read_text())["versions"]


def test_the_summary_has_the_promised_keys(small_run):
    summary = small_run.summary
    assert summary == json.loads((small_run.folder / "summary.json").read_text())
    assert {"command", "model", "block", "dataset", "seed", "baseline", "cycles", "test", "seconds"} <= summary.keys()
    assert [row["cycle"] for row in summary["cycles"]] == [1, 2]
    for row in summary["cycles"]:
        assert {"top1_before", "top1_after_restart", "top1", "test_top1", "seconds"} <= row.keys()
        assert row["top1_before"] == row["top1_after_restart"]
        assert row["logit_error"] < 1e-5
        assert row["loss_after_restart"] < row["loss_before"] + 0.2


def test_it_learns_and_the_merged_network_is_as_good(small_run):
    summary = small_run.summary
    assert summary["test"]["top1"] > 60
    assert summary["test"]["top1"] == summary["fused"]["test_top1"]
    assert summary["fused"]["rel_error_fp64"] < 1e-12


def test_metrics_are_an_object_an_epoch(small_run):
    lines = [json.loads(line) for line in (small_run.folder / "metrics.jsonl").read_text().splitlines()]
    expected = [(cycle, epoch + 1) for cycle, epochs in ((0, 4), (1, 2), (2, 2)) for epoch in range(epochs)]
    assert [(line["cycle"], line["epoch"]) for line in lines] == expected
    assert {"loss", "train_top1", "val_top1", "lr", "attach_rate", "images_per_second"} <= lines[0].keys()
    with (small_run.folder / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [line["loss"] for line in lines]


def test_best_is_the_first_epoch_with_the_highest_validation_top1(small_run):
    lines = [json.loads(line) for line in (small_run.folder / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_top1"])
    assert (small_run.summary["chosen"]["cycle"], small_run.summary["chosen"]["epoch"]) == (
        best["cycle"],
        best["epoch"],
    )


def test_people_read_stderr_and_log_txt(small_run):
    log = (small_run.folder / "log.txt").read_text()
    for text in ("repvgg_a0_cifar: 5 repvgg blocks", "merged and regrew 5 blocks", "after    loss", "next "):
        assert text in small_run.stderr
        assert text in log


@pytest.mark.soak
def test_the_saved_configuration_repeats_the_run_of_a_whole_network(tmp_path):
    words = "cycle --model repvgg_a0_cifar --dataset digits --baseline-epochs 4 --cycles 2 --epochs 2 --json"
    settings = (
        "cycle.schedule=restart --baseline-lr 0.1 --lr 0.05 cycle.attach=ramp cycle.attach_epochs=1 run.precision=fp32"
    )
    done = repan(*words.split(), *settings.split(), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "merged and regrew 22 blocks" in done.stderr
    again = repan("cycle", "-c", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again", "--json")
    assert again.returncode == 0, again.stderr
    summary, repeated = json.loads(done.stdout), json.loads(again.stdout)
    assert summary["test"]["top1"] > 60
    assert [row["test_top1"] for row in repeated["cycles"]] == [row["test_top1"] for row in summary["cycles"]]
    first, second = (torch.load(tmp_path / f / "last.pt", weights_only=True)["weights"] for f in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_curves_are_drawn(small_run):
    with Image.open(small_run.folder / "curves.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("val", [None, 50.0])
def test_curves_of_the_shortest_runs(tmp_path, epochs, val):
    record = {"loss": 1.0, "val_loss": val, "train_top1": 40.0, "val_top1": val, "lr": 0.1, "attach_rate": 1.0}
    records = [{**record, "cycle": number % 2, "epoch": 1} for number in range(epochs)]
    draw_curves(records, tmp_path / "curves.png", title="short", tests={0: 50.0})
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------- other commands


def test_train(capsys, tmp_path):
    words = "--block acb --epochs 1 data.val_fraction=0 data.batch_size=256 --json --out"
    code, out, err = run(capsys, "train", *DIGITS, *words.split(), tmp_path / "run")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["cycles"] == []
    assert summary["block"] == "acb"
    assert summary["chosen"]["file"] == "last.pt"
    assert not (tmp_path / "run" / "best.pt").exists()


def test_cycles_start_from_a_checkpoint(capsys, small_run, tmp_path):
    words = ["--init", small_run.folder / "cycle_00.pt", "--dataset", "digits", "--cycles", 1, "--epochs", 1]
    words += ["data.batch_size=256"]
    code, out, err = run(capsys, "cycle", *words, "--out", tmp_path / "run", "--json", "cycle.restart=none")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["model"] == "repvgg_a0_cifar"
    assert summary["baseline"]["test_top1"] == small_run.summary["baseline"]["test_top1"]
    assert (tmp_path / "run" / "best.pt").exists()
    assert "no restart (control)" in err


def test_fuse_writes_every_format_with_its_proof(capsys, small_run, tmp_path):
    out_file = tmp_path / "plain.safetensors"
    code, out, err = run(
        capsys, "fuse", small_run.folder / "best.pt", "-o", out_file, "-f", "pt", "-f", "safetensors", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["out"] == [str(tmp_path / "plain.pt"), str(out_file)]
    assert report["rel_error_fp64"] < 1e-12
    assert report["params_after"] < report["params_before"]
    scores = []
    for path in (small_run.folder / "best.pt", *report["out"]):
        code, out, _ = run(capsys, "evaluate", path, "--json")
        scores.append(json.loads(out))
    assert [score["form"] for score in scores] == ["multi-branch", "fused", "fused"]
    assert len({score["top1"] for score in scores}) == 1
    assert scores[0]["top1"] == small_run.summary["test"]["top1"]


def test_fuse_needs_no_options(capsys, small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(small_run.folder / "last.pt", "checkpoint.pt")
    code, out, err = run(capsys, "fuse", "checkpoint.pt")
    assert (code, err) == (0, "")
    assert "in float64" in out
    assert (tmp_path / "checkpoint_fused.pt").exists()
    assert "already fused" in one_line(capsys, "fuse", "checkpoint_fused.pt")


def test_fusing_the_same_file_gives_the_same_bytes(capsys, small_run, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        run(capsys, "fuse", small_run.folder / "last.pt", "-o", tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_evaluate(capsys, small_run):
    _, out, _ = run(capsys, "evaluate", small_run.folder / "best.pt", "--fused", "--split", "val", "--json")
    score = json.loads(out)
    assert score.keys() >= {"top1", "top5", "loss", "images", "form", "dataset", "split"}
    assert (score["form"], score["split"], score["dataset"], score["images"]) == ("fused", "val", "digits", 143)
    code, out, err = run(capsys, "evaluate", small_run.folder / "best.pt")
    assert (code, err) == (0, "")
    assert f"multi-branch  {small_run.summary['test']['top1']:.2f}" in out


def test_networks_trained_on_a_part_of_a_data_set_are_scored_on_that_part(capsys, small_run, tmp_path):
    part, out = ("data.classes=3", "data.per_class=30"), tmp_path / "run"
    words = ("--dataset", "digits", "--epochs", 1, "data.batch_size=32", "run.precision=fp32", *part)
    code, text, err = run(capsys, "train", "--model", "repvgg_a0_cifar", *words, "--out", out, "--json")
    assert code == 0, err
    summary = json.loads(text)
    assert (summary["classes"], summary["images"]) == (3, {"train": 81, "val": 9, "test": 107})
    for more in ((), ("--dataset", "digits"), ("--fused",)):
        code, text, err = run(capsys, "evaluate", out / "best.pt", "--json", *more)
        assert (code, err) == (0, "")
        score = json.loads(text)
        assert (score["top1"], score["images"]) == (summary["test"]["top1"], 107)
        assert list(score["class_top1"]) == ["0", "1", "2"]
    _, text, _ = run(capsys, "evaluate", out / "best.pt", "--split", "val", "--json")
    assert json.loads(text)["images"] == 9
    whole = small_run.folder / "best.pt"
    refused = one_line(capsys, "distill", "--model", "repvgg_a0_cifar", "--teacher", whole, *words)
    assert "knows 10 classes, digits has 3" in refused
    assert "data.classes=11, but digits has 10" in one_line(
        capsys, "train", "--model", "repvgg", "-d", "digits", "data.classes=11"
    )
    assert "data.classes: must be at least 2, got 1" in one_line(
        capsys, "train", "--model", "repvgg", "-d", "digits", "data.classes=1"
    )


def test_info(capsys, small_run):
    code, out, _ = run(capsys, "info", small_run.folder / "cycle_01.pt", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["model"], facts["form"], facts["cycle"]) == ("repvgg_a0_cifar", "multi-branch", 1)
    assert len(facts["layers"]) == 5
    assert facts["config"]["cycle.count"] == 2
    code, out, _ = run(capsys, "info", small_run.folder / "fused.pt")
    assert code == 0
    assert "fused" in out
    code, out, _ = run(capsys, "info", small_run.folder / "best.pt")
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.partition("\n\n")[0].splitlines()[1:])
    assert facts["metrics"].startswith("val top-1 ")
    assert not facts.keys() & {"teachers", "attach_rate"}, "what says nothing is not shown"
    assert [*facts][-3:] == ["split_digest", "labels_digest", "digest"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("models", "repvgg_a1_cifar"),
        ("blocks", "acb"),
        ("datasets", "cifar100"),
        ("presets", "recipes/cifar"),
        ("schedules", "cosine"),
        ("settings", "cycle.attach_epochs"),
        ("optimizers", "adamw"),
        ("trackers", "tensorboard"),
    ],
)
def test_list(capsys, kind, name):
    code, out, _ = run(capsys, "list", kind, "--json")
    assert code == 0
    assert json.loads(out)[name]
    assert run(capsys, "list", kind)[0] == 0


def test_list_with_a_pattern(capsys):
    _, out, _ = run(capsys, "list", "settings", "cycle.*", "--json")
    assert all(name.startswith("cycle.") for name in json.loads(out))
    _, out, _ = run(capsys, "list", "models", "timm:resnet18*", "--json")
    assert "timm:resnet18" in json.loads(out)
    assert "no blocks match 'x*'" in one_line(capsys, "list", "blocks", "x*")


def test_printed_settings_are_valid_input(capsys, tmp_path):
    words = ["cycle", "--model", "repvgg", "--dataset", "cifar10", "optim.clip=null", "--print-config"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    _, again, _ = run(capsys, "cycle", "-c", tmp_path / "printed.yaml", "--print-config")
    assert again == out
    _, train, _ = run(capsys, "train", *words[1:])
    assert "cycle:" not in train
    assert "epochs: 160" in train


def test_every_shortcut_is_an_option_of_cycle(capsys):
    _, out, _ = run(capsys, "cycle", "--help")
    shortcuts = {how.flags[0]: how.setting for *_, how, _ in declared(CycleOptions) if isinstance(how, Option)}
    for flag, key in shortcuts.items():
        assert flag in out
        assert key is None or key in config.SCHEMA or key in config.OVERLAY


@pytest.mark.parametrize(
    ("given", "baseline"),
    [
        ({"optim.lr": "0.02", "epochs": "3"}, (0.02, 3)),
        ({"optim.lr": "0.02", "baseline.optim.lr": "0.3", "epochs": "3", "baseline.epochs": "4"}, (0.3, 4)),
    ],
)
def test_the_rate_and_length_of_cycles_are_the_baselines_too_as_help_says(capsys, given, baseline):
    first, *others = cycle_plan(config.build(given), baseline=True)
    assert (first.optim.lr, first.epochs) == baseline
    assert {phase.epochs for phase in others} == {3}
    _, out, _ = run(capsys, "cycle", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert "Peak learning rate; if the baseline has its own (--baseline-lr), only that of the cycles." in words
    assert "Epochs of each cycle. Recipes give the baseline its own: --baseline-epochs." in words


@pytest.mark.parametrize("command", ["cycle", "train", "fuse", "evaluate", "info", "list"])
def test_help_has_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"repan {command}" in out.split("Options")[0].replace("Usage: repan", "", 1)
    assert "<bool>" not in out, "a flag takes no value"


def test_help_can_be_read_on_white():
    result = repan("cycle", "--help", FORCE_COLOR="1", TERM="xterm-256color")
    colours = set(re.findall(r"\x1b\[([\d;]+)m", result.stdout)) - {"0"}
    assert "1" in colours
    assert not colours & {"33", "36", "1;33", "1;36", "2;33", "2;36", "1;32", "37"}, (
        colours
    )  # yellow, cyan, green, white


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"repan {repan_cli.__version__}\n", "")


def test_the_environment_for_bug_reports(capsys):
    for words in (("--version", "-v"), ("-v", "--version")):
        code, out, err = run(capsys, *words)
        assert (code, err) == (0, "")
        rows = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert str(torch.__version__).startswith(rows["torch"])
        assert {"python", "timm", "extras", "system", "cpu", "memory", "cuda"} <= rows.keys()
    assert "-v belongs to --version" in one_line(capsys, "-v", "list", "blocks")


def test_gpus_are_those_of_the_driver(monkeypatch):

    answer = subprocess.CompletedProcess([], 0, "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15\n")
    monkeypatch.setattr(version.subprocess, "run", lambda *args, **options: answer)
    rows = dict(version.rows())
    assert rows["gpu 0"] == "NVIDIA H100 80GB HBM3, 81559 MiB, driver 550.54.15"
    assert "and sees " in rows["cuda"]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "repvg", "--dataset", "digits"), "unknown model 'repvg'; did you mean repvgg"),
        (("--model", "repvgg", "--dataset", "digit"), "unknown data set 'digit'; did you mean digits"),
        ((*DIGITS, "--block", "repvg"), "unknown block family 'repvg'; did you mean repvgg"),
        ((*DIGITS, "cycle.rul=reset"), "unknown setting 'cycle.rul'; did you mean cycle.rule"),
        ((*DIGITS, "optim.schedule=cosin"), "unknown schedule 'cosin'; did you mean cosine"),
        ((*DIGITS, "cycle.rule=calib"), "cycle.rule: 'calib' is not a choice; did you mean calibrate"),
        ((*DIGITS, "--lr", "fast"), "--lr: 'fast' is not a finite number"),
        ((*DIGITS, "--epochs", "-1"), "--epochs: must be at least 1, got -1"),
        ((*DIGITS, "--lr", "1", "optim.lr=1"), "--lr and optim.lr= are the same setting: give one"),
        ((*DIGITS, "epochs"), "'epochs' is not KEY=VALUE"),
        (
            (*DIGITS, "-c", "recipes/digit"),
            "no configuration file or preset 'recipes/digit'; did you mean recipes/digits",
        ),
        ((*DIGITS, "run.sync_bn=true"), "run.sync_bn is for several GPUs under torchrun"),
        ((*DIGITS, "--device", "gpu"), "unknown device 'gpu'; did you mean cuda?"),
        ((*DIGITS, "--device", "cuda:99"), "device cuda:99 is not available"),
        ((*DIGITS, "--init", "nowhere.pt"), "no checkpoint nowhere.pt"),
        (
            ("--model", "timm:resnet81", "--dataset", "digits"),
            "unknown model 'timm:resnet81'; did you mean timm:resnet18",
        ),
        (("--model", "repvgg"), "no data set: give --dataset NAME"),
        (("--dataset", "digits"), "no network: give --model NAME"),
        ((*DIGITS, "--pretrained"), "there are no pretrained weights of repvgg_a0_cifar"),
        ((*DIGITS, "--pretrained", "--init", "a.pt"), "model.pretrained and model.init both say"),
        (("--model", "timm:nf_resnet26", "--dataset", "digits"), "it is a ScaledStdConv2d, not a plain Conv2d"),
        (("--model", "timm:mixer_s32_224", "--dataset", "digits"), "it wants data.image_size=224"),
        (("--model", "timm:resnet18", "--dataset", "digits", "--block", "dbbb"), "did you mean dbb"),
        ((*DIGITS, "--block", "acb", "block.branches=2"), "acb has a fixed number of branches"),
        ((*DIGITS, "block.include=stages.9*"), "block.include: no convolution is named 'stages.9*'"),
        ((*DIGITS, "block.exclude=stages.9*"), "block.exclude: no convolution is named 'stages.9*'"),
        (("--model", "timm:vit_tiny_patch16_224", "--dataset", "digits"), "it wants data.image_size=224"),
        ((*DIGITS, "block.exclude=*"), "leave no block to restart"),
        (("--model", "resnet18", "--dataset", "digits", "block.include=layer9.*"), "no convolution is named"),
        (("--model", "net.py:build", "--dataset", "digits"), "no file net.py"),
        (
            ("--model", "repvgg", "--dataset", "folder", "--data-root", "nowhere"),
            "no folder nowhere: expected",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in one_line(capsys, "cycle", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_directory_is_left_alone(capsys, small_run):
    before = {path: path.stat().st_mtime_ns for path in small_run.folder.iterdir()}
    line = one_line(capsys, "cycle", *DIGITS, "--out", small_run.folder)
    assert "already exists" in line
    assert "--out" in line
    assert {path: path.stat().st_mtime_ns for path in small_run.folder.iterdir()} == before


def test_a_data_set_that_cannot_be_downloaded(capsys, tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR100, "download", offline)
    line = one_line(capsys, "cycle", "--model", "repvgg", "--dataset", "cifar100", "--data-root", tmp_path / "none")
    assert "cannot be downloaded" in line
    assert list(tmp_path.iterdir()) == []
    assert "--data-root" in line


def test_wrong_checkpoints(capsys, small_run, tmp_path):
    damaged = tmp_path / "damaged.pt"
    content = bytearray((small_run.folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    for command in ("fuse", "evaluate", "info"):
        assert "damaged" in one_line(capsys, command, damaged)
        assert "missing.pt" in one_line(capsys, command, tmp_path / "missing.pt")
    folders = write_folders(tmp_path / "photos")
    line = one_line(capsys, "evaluate", small_run.folder / "last.pt", "-d", "folder", "--data-root", folders)
    assert "knows 10 classes, folder has 2" in line
    start = ("cycle", "--dataset", "digits", "--init")
    assert "is fused" in one_line(capsys, *start, small_run.folder / "fused.pt")
    other = one_line(capsys, *start, small_run.folder / "last.pt", "--model", "repvgg_b0_cifar")
    assert "holds the network repvgg_a0_cifar, not repvgg_b0_cifar" in other
    assert "blocks of the family repvgg, not acb" in one_line(
        capsys, *start, small_run.folder / "last.pt", *DIGITS[:2], "--block", "acb"
    )


def test_places_that_cannot_be_written(capsys, small_run, tmp_path):
    last = small_run.folder / "last.pt"
    assert "cannot write /proc/x.pt: " in one_line(capsys, "fuse", last, "-o", "/proc/x.pt")
    assert "is a folder: name a file in it" in one_line(capsys, "fuse", last, "-o", tmp_path)
    for words in (("fuse", last, "-o"), ("quantize", last, "--out"), ("compare", small_run.folder, "--html")):
        assert "new/ is a folder: name a file in it" in one_line(capsys, *words, f"{tmp_path}/new/")
    assert not list(tmp_path.iterdir())
    other = tmp_path / "thesis.pt"
    other.write_text("years of work")
    assert "already exists: give another --out, or --overwrite" in one_line(capsys, "fuse", last, "-o", other)
    assert other.read_text() == "years of work"
    copy = tmp_path / "new" / "folder" / "trained.pt"
    assert run(capsys, "fuse", last, "-o", copy)[0] == 0
    copy = shutil.copy(last, tmp_path / "trained.pt")
    assert "already exists: give another --out, or --overwrite" in one_line(capsys, "fuse", last, "-o", copy)
    assert checkpoint.load(copy).card.form == "multi-branch"
    assert run(capsys, "fuse", last, "-o", copy, "--overwrite")[0] == 0
    assert checkpoint.load(copy).card.form == "fused"


def test_bad_words_for_fuse_evaluate_and_list(capsys, small_run, tmp_path):
    last = small_run.folder / "last.pt"
    assert "cannot write the format 'onx'" in one_line(capsys, "fuse", last, "-f", "onx")
    assert "a.onnx ends in .onnx, but --format is pt" in one_line(capsys, "fuse", last, "-o", "a.onnx", "-f", "pt")
    assert "is the checkpoint itself" in one_line(capsys, "fuse", last, "-o", last)
    assert "--split tset is not one of test, val, train; did you mean test" in one_line(
        capsys, "evaluate", last, "--split", "tset"
    )
    assert "unknown kind of name 'model'; did you mean models" in one_line(capsys, "list", "model")
    assert "unknown data set 'digitz'" in one_line(capsys, "evaluate", last, "-d", "digitz")


def test_an_option_that_does_not_exist_is_suggested(capsys):
    code, _, err = run(capsys, "cycle", "--mdoel", "repvgg")
    assert code == 2
    assert "--model" in err


def test_all_wrong_settings_at_once(capsys):
    code, _, err = run(capsys, "cycle", *DIGITS, "a=1", "optim.lr=x")
    assert code == 2
    assert len(err.splitlines()) == 2


def test_a_diverging_run_says_so(capsys, tmp_path):
    words = [
        "train",
        *DIGITS,
        "--epochs",
        2,
        "--out",
        tmp_path / "run",
        "optim.lr=1e30",
        "optim.clip=null",
        "run.precision=fp32",
    ]
    code, _, err = run(capsys, *words)
    assert code == 3
    assert "no longer finite" in err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "diverged"


def test_a_ramp_longer_than_its_cycle_is_reported(capsys, tmp_path):
    words = ["--cycles", 1, "--epochs", 1, "--baseline-epochs", 1, "cycle.attach=ramp", "cycle.attach_epochs=4"]
    code, _, err = run(capsys, "cycle", *DIGITS, *words, "--out", tmp_path / "run", "data.batch_size=256")
    assert code == 0
    assert "Warning: cycle.attach_epochs=4 is longer than a cycle: branches reach the attach rate 0.25, not 1" in err


def test_a_trunk_that_is_never_trained_in_a_cycle_is_reported(capsys):
    words = ["--cycles", 1, "--epochs", 2, "--baseline-epochs", 1, "cycle.freeze_trunk=true", "--dry-run"]
    code, _, err = run(capsys, "cycle", *DIGITS, *words, "cycle.attach_epochs=2")
    assert (
        code,
        "fixed for the whole of each cycle, as cycle.attach_epochs=2 is not shorter" in " ".join(err.split()),
    ) == (0, True)
    code, _, err = run(capsys, "cycle", *DIGITS, *words, "cycle.attach_epochs=1")
    assert (code, "fixed in the whole" in " ".join(err.split())) == (0, False)


def test_a_full_disk_is_named(capsys, tmp_path, monkeypatch):
    from repan_cli import checkpoint

    def full(saved, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save", full)
    code, _, err = run(capsys, "train", *DIGITS, "--epochs", 1, "data.batch_size=256", "--out", tmp_path / "run")
    assert code == 4
    assert "no space left to write" in err.splitlines()[-1]


def test_a_second_ctrl_c_leaves_at_once(capsys, tmp_path, monkeypatch):
    from repan_cli.display.console import Display

    def press_twice(display, event):
        if type(event).__name__ == "Epoch":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "show", press_twice)
    code, _, err = run(capsys, "train", *DIGITS, "--epochs", 1, "data.batch_size=256", "--out", tmp_path / "run")
    assert code == 130
    assert (
        f"Stopped: at once, without saving; the last save is whole: continue with: repan train --resume {tmp_path}"
        in err.splitlines()[-1]
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"


def test_debugging_shows_the_traceback(tmp_path):
    result = repan("compare", tmp_path / "missing", REPAN_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m repan_cli list settings | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


def test_a_timm_network_can_be_trained_and_keeps_its_name(capsys, tmp_path):
    words = [
        "train",
        "--model",
        "timm:test_resnet",
        "--dataset",
        "digits",
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
        "--json",
    ]
    code, out, err = run(capsys, *words, "data.batch_size=256", "optim.lr=0.01", "run.precision=fp32")
    assert code == 0, err
    assert json.loads(out)["model"] == "timm:test_resnet"
    assert json.loads(out)["fused"]["folded"] > 0
    code, out, _ = run(capsys, "evaluate", tmp_path / "run" / "best.pt", "--json")
    assert json.loads(out)["form"] == "multi-branch"
    assert "is already fused" in one_line(capsys, "fuse", tmp_path / "run" / "fused.pt")
