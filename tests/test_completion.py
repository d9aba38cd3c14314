"""Tab completes every name that can be typed, for words as bash splits them, without importing torch."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, loaded_after, run

from repan_cli import config
from repan_cli.cli import completion
from repan_cli.data.types import DATASETS
from repan_cli.models import BUILTIN


def by_shell(*line, cwd=None):
    """What the installed command answers bash through Typer's own protocol."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_REPAN_COMPLETE": "complete_bash"}
    env |= {"COMP_WORDS": "\n".join(("repan", *line)), "COMP_CWORD": str(len(line))}
    code = "import sys; sys.argv = ['repan']; from repan_cli.cli.app import main; main()"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=cwd, timeout=60)
    return found.stdout.split()


def in_bash(monkeypatch, *line):
    """The words offered for the last one of a line, that bash has cut into such pieces."""
    monkeypatch.setenv("COMP_WORDS", "\n".join(("repan", *line)))
    monkeypatch.setenv("COMP_CWORD", str(len(line)))
    return completion.words(line[-1].strip("="))  # as Click does


def test_the_names_are_those_that_exist():
    from timm import optim

    from repan_cli.blocks import FAMILIES
    from repan_cli.training.schedules import SCHEDULES

    assert completion.blocks() == list(FAMILIES)
    assert sorted(completion.datasets()) == sorted(DATASETS)
    assert completion.schedules() == list(SCHEDULES)
    assert set(completion.optimizers()) <= set(optim.list_optimizers())  # it registers some in a loop
    assert len(completion.optimizers()) > 0.8 * len(optim.list_optimizers())
    assert set(BUILTIN) <= set(completion.models())


def test_models_of_others_come_with_the_first_letter():
    assert not any(name.startswith("timm:r") for name in completion.models())
    complete = completion.of_setting("model.name")
    assert {"repvgg", "repvgg_a1", "repvgg_a1_cifar"} <= set(complete("repvgg"))
    assert {"timm:resnet18", "timm:resnet18d"} == set(complete("timm:resnet18"))
    assert "mobilenetv3_small_050" in complete("mobilenetv3_s")
    assert "torchvision:resnet18" in complete("torchv")


@pytest.mark.parametrize(
    ("start", "offered"),
    [
        ("cycle.rul", ["cycle.rule=", "cycle.rule=calibrate", "cycle.rule=running", "cycle.rule=reset"]),
        ("cycle.rule=r", ["cycle.rule=running", "cycle.rule=reset"]),
        ("ema.enabled=", ["ema.enabled=true", "ema.enabled=false"]),
        ("optim.clip=", ["optim.clip=10.0", "optim.clip=null"]),
        ("optim.schedule=co", ["optim.schedule=cosine", "optim.schedule=constant"]),
        ("baseline.optim.decay=", ["baseline.optim.decay=weights", "baseline.optim.decay=all"]),
        ("run.trackers=w", ["run.trackers=wandb"]),
        ("run.trackers=[tensorboard,", ["run.trackers=[tensorboard,wandb"]),
        ("block.kernel=", ["block.kernel=[]"]),
        ("nothing=", []),
        ("ema.", ["ema.enabled=", "ema.decay="]),
    ],
)
def test_settings_and_their_values(start, offered):
    assert completion.words(start) == offered


def test_every_setting_is_offered():
    assert completion.words("") == [f"{key}=" for key in [*config.SCHEMA, *config.OVERLAY]]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (("train", "cycle.rule", "=", "cal"), ["calibrate"]),
        (("train", "cycle.rule", "="), ["calibrate", "running", "reset"]),
        (("train", "--model", "timm", ":"), []),
        (("train", "--model", "timm", ":", "resnet18"), ["resnet18", "resnet18d"]),
        (("train", "model.name", "=", "timm", ":", "resnet18"), ["resnet18", "resnet18d"]),
        (("train", "--model", "=", "timm", ":", "resnet18"), ["resnet18", "resnet18d"]),
        (("train", "--model", "repvgg", "ema.e"), ["ema.enabled=", "ema.enabled=true", "ema.enabled=false"]),
    ],
)
def test_words_that_bash_has_cut(monkeypatch, line, offered):
    assert in_bash(monkeypatch, *line) == offered


def test_files_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/cycle/a/best.pt", "runs/cycle/a/config.yaml", "runs/train/b/config.yaml", "mine.yaml", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.pt").write_text("")
    checkpoints = completion.completes(completion.checkpoints)
    assert checkpoints("") == ["runs/cycle/a/best.pt"]
    assert checkpoints("runs/cy") == ["runs/cycle/a/best.pt"]
    assert checkpoints("./r") == ["./runs/cycle/a/best.pt"]
    assert checkpoints(f"{tmp_path}/runs/cycle/a/b") == [f"{tmp_path}/runs/cycle/a/best.pt"]
    assert checkpoints("nowhere/") == []
    assert set(completion.runs()) == {"latest", "runs/cycle/a", "runs/train/b"}
    assert {"recipes/digits", "mine.yaml"} <= set(completion.presets())
    assert by_shell("evaluate", "runs/cy", cwd=tmp_path) == ["runs/cycle/a/best.pt"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (("train", "--dataset", "cifar"), ["cifar10", "cifar100"]),
        (("cycle", "--block", "re"), ["rep", "repvgg"]),
        (("train", "-m", "repvgg", "cycle.rule", "=", "cal"), ["calibrate"]),
        (("list", "sc"), ["schedules"]),
        (("cycle", "-c", "recipes/c"), ["recipes/cifar", "recipes/cifar_quick"]),
        (("evaluate", "x.pt", "--split", "t"), ["test", "train"]),
    ],
)
def test_the_shell_is_answered(line, offered):
    assert by_shell(*line) == offered


def test_completing_is_light():
    code = "from repan_cli.cli import app, completion; completion.models('t'); completion.words('optim.name='); "
    assert not loaded_after(code + "completion.kinds()") & {"torch", "torchvision", "timm", "numpy", "sklearn"}


def test_list_describes_settings_and_presets(capsys):
    rows = json.loads(run(capsys, "list", "settings", "--json")[1])
    assert rows["cycle.rule"]["choices"] == ["calibrate", "running", "reset"]
    assert rows["optim.lr"] == {"text": "Peak learning rate.", "type": "float", "default": 0.1, "above": 0}
    assert rows["optim.clip"]["type"] == "float or null"
    assert rows["block.kernel"]["type"] == "list of int"
    assert rows["baseline.epochs"]["default"] is None
    shown = run(capsys, "list", "settings", "cycle.rule")[1]
    assert "only eval mode. (str, default calibrate)" in shown
    assert "digits" in json.loads(run(capsys, "list", "presets", "--json")[1])["recipes/digits"]
