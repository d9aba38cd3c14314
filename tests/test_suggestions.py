"""Words of other programs on the command line: each is answered with what to type instead, all of them at once."""

import re
import subprocess
import sys

import pytest
from support import ROOT, run

from repan_cli import config
from repan_cli.cli import suggestions
from repan_cli.cli.app import COMMANDS
from repan_cli.commands import early
from repan_cli.commands.options import FuseOptions
from repan_cli.config.settings import SCHEMA
from repan_cli.errors import InputError

D = "-m repvgg -d digits"
OPTIONS = [
    (f"train {D} --bs 64", "--bs; did you mean --batch-size 64?"),
    (f"train {D} -b 64", "-b; did you mean --batch-size 64?"),
    (f"train {D} --gpu 0", "--gpu; did you mean --device cuda:0?"),
    (f"train {D} --workers=4", "--workers; did you mean data.workers=4?"),
    (f"train {D} -j 8", "-j; did you mean data.workers=8?"),
    (f"train {D} --amp", "--amp; did you mean run.precision=bf16?"),
    (f"cycle {D} --no-amp", "--no-amp; did you mean run.precision=fp32?"),
    (f"train {D} --output my_run", "--output; did you mean --out my_run?"),
    (f"train {D} --project p", "--project; did you mean --out?"),
    (f"train {D} --opt adamw", "--opt; did you mean optim.name=adamw?"),
    (f"train {D} --weight-decay 1e-4", "--weight-decay; did you mean optim.weight_decay=1e-4?"),
    (f"train {D} --smoothing 0.1", "--smoothing; did you mean optim.label_smoothing=0.1?"),
    (f"train {D} --label-smoothin 0.1", "--label-smoothin; did you mean optim.label_smoothing=0.1?"),
    (f"train {D} --model-ema", "--model-ema; did you mean ema.enabled=true?"),
    (f"train {D} --log-wandb", "--log-wandb; did you mean run.trackers=wandb?"),
    (f"train {D} --imgsz 64", "--imgsz; did you mean data.image_size=64?"),
    (f"train {D} --weights a.pt", "--weights; did you mean --init a.pt?"),
    (f"train {D} --num-classes 10", "--num-classes; the data set sets the number of classes"),
    (f"train {D} -q", "-q; progress and warnings are on stderr: add 2>/dev/null"),
    (f"train {D} --dropout 0.1", "--dropout; see 'repan train --help'"),
    (f"train {D} --dist-bn reduce", "--dist-bn; see 'repan train --help'"),
    ("fuse a.pt --fp16", "--fp16; did you mean --half?"),
    ("fuse a.pt --force", "--force; did you mean --overwrite?"),
    ("fuse a.pt --opset-version 12", "--opset-version; did you mean --opset?"),
    ("fuse a.pt --fused", "--fused: it belongs to other commands than 'repan fuse', such as 'repan evaluate'"),
    ("benchmark repvgg --bs 16", "--bs; did you mean --batch 16?"),
    ("benchmark repvgg --imgsz 64", "--imgsz; did you mean --image-size 64?"),
    ("evaluate a.pt --gpu 1", "--gpu; did you mean --device cuda:1?"),
    ("predict a.pt b.png --topk 1", "--topk; did you mean --top?"),
    ("--list-models", "--list-models; use 'repan list models'"),
    (f"train {D} --workers -1", "--workers; did you mean data.workers=-1?"),
    ("--json info a.pt", "--json: options follow the command, as in 'repan info OPTIONS'"),
]


@pytest.mark.parametrize(("words", "says"), OPTIONS)
def test_an_option_of_another_program(capsys, words, says):
    code, out, err = run(capsys, *words.split())
    assert (code, out, err) == (2, "", f"Error: no such option: {says}\n")


def test_all_unknown_options_are_answered_at_once(capsys):
    words = f"train {D} --lr -1 --bs 64 --amp --epochs 5 --seed=3 -q --opt=sgd optim.nesterov=false --out -"
    code, _, err = run(capsys, *words.split())
    found = re.findall(r"^Error: no such option: (-+\w+); ", err, re.M)
    assert (code, found, len(err.splitlines())) == (2, ["--bs", "--amp", "-q", "--opt"], 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("val a.pt", "'val'; did you mean 'repan evaluate'?"),
        ("export a.pt", "'export'; did you mean 'repan fuse'?"),
        ("finetune", "'finetune'; did you mean 'repan cycle -c recipes/finetune'?"),
        ("datasets", "'datasets'; did you mean 'repan list datasets'?"),
        ("version", "'version'; did you mean 'repan --version'?"),
        ("detect train data=digits", "'detect'; did you mean 'repan train'?"),
        ("detect export", "'detect'; did you mean 'repan fuse'?"),
        ("quantise a.pt", "'quantise'; did you mean 'quantize'?"),
        ("foo --device cpu", "'foo'; see 'repan --help'"),
    ],
)
def test_a_command_of_another_program(capsys, words, says):
    code, out, err = run(capsys, *words.split())
    assert (code, out, err) == (2, "", f"Error: no such command {says}\n")


@pytest.mark.parametrize(
    ("word", "option"),
    [
        *(("digits", "--dataset"), ("repvgg", "--model"), ("timm:resnet18", "--model"), ("acb", "--block")),
        *(("my.yaml", "-c"), ("a b.pt", "--init"), (".", "--dataset")),
    ],
)
def test_a_word_without_its_option(capsys, word, option):
    shown = f"'{word}'" if " " in word else word
    code, _, err = run(capsys, "train", word)
    assert (code, err) == (2, f"Error: '{word}' is not KEY=VALUE; did you mean {option} {shown}?\n")


def test_a_section_that_is_given_a_name(capsys):
    _, _, err = run(capsys, "train", "model=repvgg", "data=digits", "optim=sgd")
    first, second, third = err.splitlines()
    assert first == "Error: model is a section; did you mean model.name=repvgg?"
    assert second == "Error: data is a section; did you mean data.name=digits?"
    assert third.startswith("Error: optim is a section: give optim.SETTING=VALUE, see ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fuse a.pt onnx", "(onnx); did you mean --format onnx?"),
        ("fuse a.pt plain.onnx", "(plain.onnx); did you mean --out plain.onnx?"),
        ("evaluate a.pt digits", "(digits); did you mean --dataset digits?"),
        ("evaluate a.pt b.pt", "(b.pt); see 'repan evaluate --help'"),
        ("quantize a.pt b c", "(b c); see 'repan quantize --help'"),
    ],
)
def test_an_argument_too_many(capsys, words, says):
    code, _, err = run(capsys, *words.split())
    assert (code, err) == (2, f"Error: got unexpected extra argument(s) {says}\n")


def test_names_that_match_nothing_are_answered_with_a_wider_glob(capsys):
    for words, says in {
        "models repvgg": "; try '*repvgg*'",
        "settings optim": "; try 'optim.*'",
        "settings lr": "; try '*lr*'",
        "blocks abc": "; did you mean acb?",
    }.items():
        _, _, err = run(capsys, "list", *words.split())
        assert err.endswith(f"{says}\n"), err


def test_help_is_a_command_too(capsys):
    assert run(capsys, "help", "info") == run(capsys, "info", "--help")
    assert run(capsys, "help") == run(capsys, "--help")


def test_every_answer_names_something_that_exists():
    known = {flag for command in COMMANDS.values() for flag in suggestions._flags(command.options)}
    assert {flag for flags in suggestions.FLAGS.values() for flag in flags} <= known
    assert set(suggestions.OTHER_FLAGS.values()) <= known
    assert suggestions.FLAGS.keys() <= SCHEMA.keys()
    assert {text.split()[0] for text in suggestions.OTHER_COMMANDS.values()} - {"--version"} <= COMMANDS.keys()
    assert not suggestions.OTHER_COMMANDS.keys() & COMMANDS.keys()


@pytest.mark.parametrize("words", ["--help", "cycle --help"])
def test_help_into_a_pipe_that_closes_is_no_error(words):
    command = f"set -o pipefail; {sys.executable} -m repan_cli {words} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_several_formats_in_one_option(tmp_path):
    for given in (("onnx,pt",), ("onnx", "pt")):
        options = FuseOptions("a.pt", out=tmp_path / "plain", formats=given)
        assert [target.kind for target in early.fuse_targets(options)] == ["onnx", "pt"]
    with pytest.raises(InputError, match="cannot write the format 'onx'; did you mean onnx"):
        early.fuse_targets(FuseOptions("a.pt", out=tmp_path / "plain", formats=("pt,onx",)))


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (f"cycle {D} --epochs 2", True),
        (f"cycle {D} --epochs 2 --baseline-epochs 9", False),
        (f"cycle {D} --epochs 15", False),
        (f"cycle {D} --cycles 3", False),
        (f"train {D} --epochs 2", False),
    ],
)
def test_a_baseline_that_stays_longer_than_the_given_epochs_is_reported(monkeypatch, words, warned):
    told = []
    monkeypatch.setattr(early, "warn", told.append)
    command, *rest = words.split()
    given = {"model.name": "repvgg", "data.name": "digits"}
    keys = {"--epochs": "epochs", "--baseline-epochs": "baseline.epochs", "--cycles": "cycle.count"}
    given |= {keys[name]: value for name, value in zip(rest[4::2], rest[5::2], strict=True)}
    early._check_training(command, config.resolve(command, None, given))
    expected = "--epochs is the length of a cycle; the baseline keeps its 15 epochs: set --baseline-epochs"
    assert told == [expected] * warned


def test_help_says_each_default(capsys):
    _, out, _ = run(capsys, "train", "--help")
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    for text in (
        "augmentation; default 0.",
        "or mps; default auto.",
        "ROOT itself; default data.",
        "default: the recipe",
    ):
        assert text in said
