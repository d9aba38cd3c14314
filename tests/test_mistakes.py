"""Common mistakes on the command line: each ends with its exit code and one line that names the cause and the fix."""

import errno
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support import run

from repan_cli.cli import app
from repan_cli.commands import early
from repan_cli.session import runner
from repan_cli.system.weight_files import no_checkpoint

D = "-m repvgg_a0_cifar -d digits"
MISTAKES = [
    # commands and options
    ("trian -m repvgg", r"no such command 'trian'; did you mean 'train'\?"),
    ("train --mdoel repvgg -d digits", r"no such option: --mdoel; did you mean --model"),
    ("--verison", r"no such option: --verison; did you mean --version\?"),
    (f"train {D} --out", r"option '--out' requires an argument, FOLDER: run directory; default runs/COMMAND/TIME-"),
    (f"train {D} --cycles 3", r"no such option: --cycles: it belongs to other commands .* such as 'repan cycle'"),
    ("fuse", r"missing argument 'CHECKPOINT': a file .*; see 'repan fuse --help'"),
    ("info best.pt fused.pt", r"got unexpected extra argument\(?s?\)? \(fused.pt\); see 'repan info --help'"),
    ("list model", r"unknown kind of name 'model'; did you mean models"),
    ("list blocks zzz*", r"no blocks match 'zzz\*'"),
    ("-v list blocks", r"-v belongs to --version: 'repan --version -v'"),
    ("train --resume", r"option '--resume' requires an argument, RUN: resume a run: its directory, or 'latest'$"),
    ("fuse best.pt --out a.onnx --opset", r"option '--opset' requires an argument, N: ONNX operator set version, for"),
    # settings
    (f"train {D} epochs = 3", r"'epochs' is not KEY=VALUE, without a space beside the '='"),
    (f"train {D} fast", r"'fast' is not KEY=VALUE, such as optim.lr=0.1"),
    (f"train {D} lr=0.1", r"unknown setting 'lr'; did you mean optim.lr\?"),
    (f"train {D} optim.weight-decay=1", r"unknown setting 'optim.weight-decay'; did you mean optim.weight_decay"),
    (f"train {D} optim=0.1", r"optim is a section: give optim.SETTING=VALUE, see 'repan list settings \"optim\.\*\"'"),
    (f"train {D} optim.lr=1 optim.lr=2", r"optim.lr is given twice on the command line"),
    (f"train {D} --lr 1 optim.lr=1", r"--lr and optim.lr= are the same setting: give one"),
    (f"train {D} --lr 0,1", r"--lr: '0,1' is not a finite number"),
    (f"cycle {D} --baseline-epochs 0", r"--baseline-epochs: must be at least 1, got 0"),
    (f"train {D} --epochs 2.5", r"--epochs: '2.5' is not a whole number"),
    (f"train {D} --batch-size 1", r"--batch-size: must be at least 2, got 1"),
    (
        f"cycle {D} --lr 0.05 --baseline-lr 0.1",
        "optim.lr=0.05 has no effect with cycle.schedule=continuous, .*: give --baseline-lr instead of --lr",
    ),
    (f"train {D} run.compile=maybe", r"run.compile: 'maybe' is not a choice; choose auto, on or off"),
    (f"train {D} data.augment=autoaugmnt", r"data.augment: 'autoaugmnt' is not a choice; did you mean autoaugment"),
    (f"train {D} optim.schedule=cosin", r"unknown schedule 'cosin'; did you mean cosine\?"),
    (f"train {D} optim.name=sgdd", r"unknown optimizer 'sgdd'; did you mean sgd"),
    (f"train {D} run.trackers=wandbb", r"unknown tracker 'wandbb'; did you mean wandb\?"),
    # what does not go together
    (f"train {D} cycle.count=3", r"cycle.count has no effect in 'repan train': it belongs to 'repan cycle'"),
    (f"train {D} --teacher best.pt", r"teacher.name has no effect in 'repan train': give it to 'repan distill'"),
    (f"distill {D}", r"no teacher: give --teacher FILE or timm:NAME"),
    (f"cycle {D} --pretrained --init best.pt", r"model.pretrained and model.init both say .*: give one"),
    (f"cycle {D} data.val_fraction=0 cycle.start_from=best", r"cycle.start_from=best needs .*; set data.val_fraction"),
    (f"train {D} --dry-run --resume run", r"--dry-run cannot be combined with --resume: the run keeps its settings"),
    ("train --resume run --out other", r"--out cannot be combined with --resume: .* in its own directory"),
    # networks
    ("train -m RepVGG -d digits", r"unknown model 'RepVGG'; did you mean repvgg\?"),
    ("train -m timm:resnet19 -d digits", r"unknown model 'timm:resnet19'; did you mean timm:resnet18"),
    ("train -m best.pt -d digits", r"model.name=best.pt is a file of weights: give it as --init"),
    ("train -m net.py -d digits", r"model.name=net.py does not name a function: give net.py:FUNCTION"),
    ("train -m net.py:build -d digits", r"net.py has no function 'build'"),
    (f"train {D} --block repvg", r"unknown block family 'repvg'; did you mean repvgg"),
    ("train -m repvgg", r"no data set: give --dataset NAME, see 'repan list datasets'"),
    # data
    ("train -m repvgg -d cifar-100", r"unknown data set 'cifar-100'; did you mean cifar100"),
    ("train -m repvgg -d empty", r"no folder empty/train, nor classes in empty: expected .*; --data-root names"),
    ("train -m repvgg -d one", r"one holds only one class \('cat'\), at least two are needed: expected .*"),
    ("train -m repvgg -d photos --data-root empty", r"data.name=photos is a folder, and data.root=empty is another"),
    (
        "train -m repvgg -d folder --data-root empty",
        r"no folder empty/train, nor classes in empty: expected .*; --data-root names another",
    ),
    ("evaluate best.pt -d folder --data-root photos", r"knows 10 classes, folder has 2"),
    # machine
    (f"train {D} --device gpu", r"unknown device 'gpu'; did you mean cuda\?$"),
    (f"train {D} --device 1", r"unknown device '1'; did you mean cuda:1\?$"),
    (f"train {D} --device tpux", r"unknown device 'tpux'; give auto, cpu, cuda, cuda:N or mps"),
    ("train -m repvgg -d no/where", r"no folder no/where: give --dataset FOLDER"),
    ("train -m repvgg -d text.pt", r"text.pt is a file: give --dataset FOLDER with a folder of images for each class"),
    ("train -m repvgg -d data.py:make", r"data.py:make is a file: give --dataset FOLDER"),
    ("train -m repvgg -d photos/test/cat", r"photos/test/cat holds 0.png and no class folders; did you mean --data-r"),
    ("train -m gray.py:build -d folder --data-root photos", r"gray.py:build does not run .*; .* data.channels=1$"),
    ("evaluate plain", r"unknown model 'plain'; did you mean plain.onnx or plain.pt2\?"),
    ("train -m net:build -d digits", r"unknown model 'net:build'; did you mean net.py:build\?"),
    ("train -m net.build -d digits", r"unknown model 'net.build'; did you mean net.py:build\?"),
    (f"train {D} --device cuda:99", r"device cuda:99 is not available: PyTorch sees \d+ GPUs?; try --device auto"),
    # files
    (f"train {D} -c recipes/cifer", r"no configuration file or preset 'recipes/cifer'; did you mean recipes/cifar"),
    (f"train {D} -c twice.yaml", r"twice.yaml line 3: the key 'lr' appears twice"),
    (f"train {D} -c best.pt", r"cannot read best.pt: not a text file"),
    (f"train {D} --init text.pt", r"text.pt is text, not a network: give a file of weights, or a run's folder"),
    (
        f"train {D} --init pickled.pt",
        r"pickled.pt .* an object of torch.nn.modules.linear.Linear.*: refused, no code is run; if",
    ),
    (f"cycle {D} --init fused.pt", r"fused.pt is fused and has no branches: start from last.pt, best.pt or cycle"),
    (
        "train -m resnet18 -d digits --init best.pt",
        r"best.pt holds .* repvgg_a0_cifar, not resnet18_cifar: give --model",
    ),
    (
        f"train {D} --out run",
        r"the run directory run already exists; .*: give another --out, where --init run/last.pt",
    ),
    (f"train {D} --out best.pt/x", r"cannot create the run directory best.pt/x: Not a directory; give another --out"),
    ("train --resume nowhere", r"no run directory nowhere to resume"),
    ("train --resume empty", r"empty is not a run directory: it has no config.yaml"),
    ("cycle --resume of_study", r"of_study is the folder of a study: continue it with: repan study GRID --out of_st"),
    (f"train {D} --out of_study", r"the run directory of_study already exists; .*: repan study GRID --out of_study"),
    ("list runs", r"no runs below runs yet: 'repan cycle' begins one$"),
    ("list runs empty", r"no runs below empty yet"),
    ("list runs x*", r"no runs below runs match 'x\*'; give a folder instead of a glob to search it"),
    ("cycle --resume latest", r"no run of 'repan cycle' under runs: give its directory instead of 'latest'"),
    ("train --resume run", r"run is finished; begin another run from its weights with --init run/last.pt"),
    ("cycle --resume run", r"run is a run of 'repan train': resume it with that command"),
    ("fuse nowhere.pt", r"nowhere.pt"),
    ("fuse best.pt -f onnxx", r"cannot write the format 'onnxx'; did you mean onnx\?$"),
    ("fuse empty", r"empty is a folder without best.pt or last.pt: name a file in it"),
    ("evaluate best.pt --split tset", r"--split tset is not one of .*; did you mean test\?"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a finished run and with files that are not what they are taken for."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", f"repan train {D} --epochs 1 data.batch_size=256 --out {folder / 'run'}".split(" "))
        with pytest.raises(SystemExit):
            pass

            app.main()
    for name in ("best.pt", "fused.pt"):
        shutil.copy(folder / "run" / name, folder)
    (folder / "empty").mkdir()
    (folder / "one" / "cat").mkdir(parents=True)
    (folder / "of_study" / "arm").mkdir(parents=True)
    (folder / "of_study" / "arm" / "arm.yaml").write_text("epochs: 1\n")
    Image.new("RGB", (16, 16)).save(folder / "one" / "cat" / "a.png")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "photos" / part / name).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(np.full((16, 16, 3), 50 * number, dtype=np.uint8))
                picture.save(folder / "photos" / part / name / f"{number}.png")
    (folder / "text.pt").write_text("hello")
    (folder / "net.py").write_text("x = 1\n")
    for ending in ("json", "onnx", "pt2"):
        (folder / f"plain.{ending}").touch()
    net = "from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))\n"
    (folder / "gray.py").write_text(net)
    (folder / "twice.yaml").write_text("optim:\n  lr: 0.1\n  lr: 0.2\n")
    torch.save(torch.nn.Linear(3, 3), folder / "pickled.pt")
    return folder


def test_there_are_fifty():
    assert len({words for words, _ in MISTAKES}) == len(MISTAKES) >= 50


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_a_mistake_is_one_line(capsys, desk, monkeypatch, words, says):
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    code, out, err = run(capsys, *words.split(" "))
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert re.match("Error: .*" + says, line), line
    assert sorted(desk.rglob("*")) == before


def test_an_optional_package_is_not_there(capsys, desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, out, err = run(capsys, "train", *D.split(" "))
    assert (code, out) == (2, "")
    assert re.fullmatch("Error: the data set digits needs sklearn: .*python.* -m pip install scikit-learn\n", err)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.pt"),
            "no space left to write a.pt: free some space, or give",
        ),
        (MemoryError(), "out of memory: set a smaller --batch-size (with a larger optim.accumulate to match)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: set a smaller"),
    ],
)
def test_no_room(capsys, desk, monkeypatch, error, says):
    pass

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(runner, "prepare", fail)
    code, out, err = run(capsys, "train", *D.split(" "), "--out", desk / "new")
    assert (code, out) == (4, "")
    (line,) = err.splitlines()
    assert line.startswith(f"Error: {says}")


def test_no_words_at_all_show_the_help(capsys):
    code, out, err = run(capsys)
    assert code in (0, 2)
    assert "Usage: " in out + err
    assert "Error" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"train {D}", "before the run began; nothing was written"),
        ("train --resume run", "before the run continued; its last save is whole"),
        ("evaluate best.pt", "before the command finished"),
    ],
)
def test_ctrl_c_in_the_first_seconds_is_one_line(capsys, desk, monkeypatch, words, says):
    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(desk)
    monkeypatch.setattr(early, "check", pressed)
    before = sorted(desk.rglob("*"))
    code, _, err = run(capsys, *words.split())
    assert (code, err) == (130, f"Stopped: {says}\n")
    assert sorted(desk.rglob("*")) == before


def test_unexpected_errors_keep_their_traceback(capsys, desk, monkeypatch):
    pass

    def fail(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runner, "prepare", fail)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "train", *D.split(" "), "--out", desk / "new")


def test_only_files_that_may_hold_weights_are_suggested_for_one_that_is_missing(tmp_path):
    for name in ("nets.py", "net1.png", "netz.pt"):
        (tmp_path / name).touch()
    assert no_checkpoint(tmp_path / "net.pt") == f"no checkpoint {tmp_path}/net.pt; did you mean {tmp_path}/netz.pt?"
    (tmp_path / "netz.pt").unlink()
    assert no_checkpoint(tmp_path / "net.pt") == f"no checkpoint {tmp_path}/net.pt"
