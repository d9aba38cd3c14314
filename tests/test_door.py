"""`repan_cli.train`, `distill` and `cycle` run what the commands run, from Python, notebooks and searches."""

import json
import os
import re
import signal
import sys
import threading
import types

import numpy as np
import pytest
import torch
import yaml
from support import ROOT, assert_same, card_of, one_line, run, small_net

import repan_cli
from repan_cli import checkpoint
from repan_cli.cli.words import as_typed
from repan_cli.commands.options import CycleOptions, TrainOptions
from repan_cli.display import console
from repan_cli.display.notebook import NotebookLive
from repan_cli.door import _arguments, _options
from repan_cli.errors import InputError
from repan_cli.system.notices import LOGGER
from repan_cli.system.python_words import in_python
from repan_cli.training.events import Epoch

pytestmark = pytest.mark.usefixtures("few_blocks")

NET = {"model": "repvgg_a0_cifar", "dataset": "digits"}
QUICK = {"epochs": 1, "batch_size": 128, "data": {"per_class": 20}, "run.precision": "fp32", "optim__warmup_epochs": 0}
WORDS = ("--epochs", 1, "--batch-size", 128, "data.per_class=20", "run.precision=fp32", "optim.warmup_epochs=0")


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_run_from_python_is_that_of_the_command_to_the_bit(capsys, tmp_path):
    code, _, err = run(capsys, "train", "--model", NET["model"], "--dataset", "digits", *WORDS, "--out", tmp_path / "a")
    assert code == 0, err
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before, epochs = (handlers(), torch.get_num_threads(), list(LOGGER.handlers)), []
    summary = repan_cli.train(**NET, **QUICK, out=tmp_path / "b", on_epoch=epochs.append)
    assert torch.equal(torch.rand(3), expected), "the caller's generator is left alone"
    assert (handlers(), torch.get_num_threads(), list(LOGGER.handlers)) == before
    settings = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab"]
    assert {**settings[0]["run"], "out": None} == {**settings[1]["run"], "out": None}
    assert_same(tmp_path / "b", tmp_path / "a")
    assert [type(epoch) for epoch in epochs] == [Epoch]
    assert summary.val_top1 == epochs[0].val_top1
    assert summary.path == tmp_path / "b"
    assert summary.figures == json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary.test_top1 == summary.figures["test"]["top1"]
    assert summary.best == tmp_path / "b" / "best.pt"
    assert repan_cli.load(summary.fused)(torch.randn(1, 1, 8, 8)).shape == (1, 10)
    assert capsys.readouterr().out == "", "what is said goes to stderr"


def test_several_seeds_are_a_summary_of_summaries(tmp_path):
    summary = repan_cli.cycle(
        **NET,
        **QUICK,
        seeds=[3, 4],
        cycles=1,
        baseline_epochs=1,
        lr=0.01,
        cycle={"schedule": "restart"},
        out=tmp_path / "a",
    )
    assert [each.figures["seed"] for each in summary.runs] == [3, 4]
    assert summary.test_top1 == pytest.approx(sum(each.test_top1 for each in summary.runs) / 2)
    assert summary.figures["groups"]
    with pytest.raises(InputError, match="is finished"):
        repan_cli.cycle(resume=summary.runs[0].path)


UNPOOLS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_chans, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.unpool(*self.pool(self.norm(self.conv(images)))).mean((2, 3)))
"""


@pytest.mark.slow
def test_deterministic_kernels(tmp_path):
    """They are used during the run only, and an operator without one is refused by name."""
    flags, seen = torch.are_deterministic_algorithms_enabled, []
    repan_cli.train(**NET, **QUICK, out=tmp_path / "a")
    given = {**NET, **QUICK, "run.deterministic": True}
    repan_cli.train(**given, out=tmp_path / "b", on_epoch=lambda epoch: seen.append(flags()))
    assert (seen, flags()) == ([True], False)
    assert_same(tmp_path / "b", tmp_path / "a")
    (tmp_path / "net.py").write_text(UNPOOLS)
    given = {**QUICK, "dataset": "digits", "model": f"{tmp_path / 'net.py'}:Net"}
    with pytest.raises(InputError, match=r"^run.deterministic: max_unpool\S+ has no deterministic kernel; set"):
        repan_cli.train(**given, **{"run.deterministic": True}, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert not flags()
    repan_cli.train(**given, out=tmp_path / "c")


def test_an_interrupt_saves_and_says_how_to_continue(tmp_path):
    before, stopped = handlers(), []

    def stop(epoch):
        if not stopped:
            stopped.append(epoch)
            os.kill(os.getpid(), signal.SIGINT)

    given = {**NET, **QUICK, "epochs": 3, "out": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt, match=re.escape(f"repan_cli.train(resume={str(tmp_path / 'a')!r})")) as error:
        repan_cli.train(**given, on_epoch=stop)
    assert "everything is saved" in str(error.value)
    assert handlers() == before
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "interrupted"
    summary = repan_cli.train(resume=tmp_path / "a")
    whole = repan_cli.train(**{**given, "out": tmp_path / "b"})
    assert summary.test_top1 == whole.test_top1
    assert_same(tmp_path / "a", tmp_path / "b")


def test_an_exception_in_a_listener_ends_only_the_run(tmp_path):
    class Pruned(Exception):
        pass

    def prune(epoch):
        raise Pruned

    with pytest.raises(Pruned):
        repan_cli.train(**NET, **QUICK, out=tmp_path / "a", on_epoch=prune)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "failed"
    assert repan_cli.train(resume=tmp_path / "a").test_top1 > 0, "it heard no more"


def test_it_runs_in_any_thread(tmp_path):
    found = []
    worker = threading.Thread(target=lambda: found.append(repan_cli.train(**NET, **QUICK, out=tmp_path / "a")))
    worker.start()
    worker.join()
    assert found[0].figures["command"] == "train"


@pytest.mark.parametrize(
    ("given", "words", "shortcuts"),
    [
        ({"optim": {"lr": 0.1}, "data__cutout": 2}, ("optim.lr=0.1", "data.cutout=2"), {}),
        ({"baseline": {"optim": {"lr": 0.1}, "epochs": 2}}, ("baseline.optim.lr=0.1", "baseline.epochs=2"), {}),
        ({"block.kernel": (3, 5), "block__name": None}, ("block.kernel=[3,5]", "block.name=null"), {}),
        ({"optim.nesterov": False, "optim.lr": np.float64(0.5)}, ("optim.nesterov=false", "optim.lr=0.5"), {}),
        ({"lr": np.float32(0.5), "seeds": (1, 2), "config": "recipes/cifar"}, (), {"lr": "0.5", "seeds": "1,2"}),
        ({"pretrained": True, "teacher": None}, (), {"pretrained": True, "teacher": None}),
    ],
)
def test_values_are_written_as_users_type_them(given, words, shortcuts):
    options = _options("cycle", CycleOptions, given)
    assert options.settings == words
    assert {name: getattr(options, name) for name in shortcuts} == shortcuts
    assert options.config_file == given.get("config")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epochz": 3}, "repan_cli.train has no argument 'epochz'; did you mean epochs?"),
        ({"bs": 3}, "repan_cli.train has no argument 'bs'; did you mean batch_size?"),
        ({"num_workers": 3}, "repan_cli.train has no argument 'num_workers'; did you mean data.workers?"),
        ({"optim": "adam"}, "repan_cli.train: optim is a section of settings: give a dictionary, optim={...}"),
        ({"weight_decay": 1}, "did you mean optim.weight_decay?"),
        ({"dry_run": True}, "no argument 'dry_run'"),
        ({"cycles": 2}, "no argument 'cycles'"),
        ({"optim": {"lrr": 1}}, "unknown setting 'optim.lrr'; did you mean optim.lr"),
        ({"model": torch.nn.Linear(1, 1)}, "model cannot be a Linear.*'file.py:function'"),
        ({"lr": 0.1, "optim.lr": 0.2}, r"lr=\.\.\. and optim.lr= are the same setting"),
        ({"model": "nonsense"}, "nonsense"),
        ({"dataset": None}, "no data set"),
    ],
)
def test_unusable_input_is_an_input_error(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        repan_cli.train(**{**NET, **given})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- notebooks


class Handle:
    def __init__(self, first):
        self.shown = [first]

    def update(self, html):
        self.shown.append(html)


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook would show, as Rich and repan see one: IPython itself is no part of the tests."""
    shown = []

    def display(thing, **options):
        shown.append(thing)
        return Handle(thing) if options else None

    module = types.ModuleType("IPython.display")
    module.display, module.HTML = display, lambda text: text
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    console.on_stderr.cache_clear()
    yield shown
    console.on_stderr.cache_clear()


def test_a_notebook_shows_where_the_run_is_and_leaves_the_lines(notebook, tmp_path):
    display = console.Display(epochs={0: 2}, steps=10, log=tmp_path / "log.txt")
    assert isinstance(display.live, NotebookLive)
    with display:
        display.say("hello")
        display.live.refresh()
    assert "epoch 1/2" in display.live.handle.shown[1]
    assert display.live.handle.shown[-1] == "", "what was live is gone at the end"
    assert (tmp_path / "log.txt").read_text() == "hello\n"
    lines = [thing for thing in notebook if "hello" in str(getattr(thing, "text", thing))]
    assert len(lines) == 1, "once, and not again for log.txt"


# ---------------------------------------------------------------------------------------------- sweeps


SWEEP = yaml.safe_load(
    next(block for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.S))
)
CHOSEN = {"optim.lr": 0.05, "optim.weight_decay": 1e-05, "data.cutout": 2, "batch_size": 64, "pretrained": False}
FORMS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags")


def words_of_agent(form, chosen):
    """The command line that W&B's agent starts, by its own code."""
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="needs wandb")
    forms = sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    words = []
    for word in sweeps.create_sweep_command(list(SWEEP["command"])):
        words += forms[form] if word == "${args}" else [word]
    return words[1:]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_agent_of_wandb_may_write_arguments_as_it_likes(capsys, form):
    chosen = {key: value for key, value in CHOSEN.items() if "." in key} if form == "args_no_hyphens" else CHOSEN
    code, out, err = run(capsys, *words_of_agent(form, chosen), "--print-config")
    assert code == 0, err
    settings = yaml.safe_load(out)
    assert settings["optim"]["lr"] == 0.05
    assert settings["optim"]["weight_decay"] == 1e-05
    assert settings["data"]["cutout"] == 2
    assert settings["run"]["trackers"] == ["wandb"]
    assert "batch_size" not in chosen or settings["data"]["batch_size"] == 64


def test_the_sweep_of_the_manual_runs_offline(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "abc123"}.items():
        monkeypatch.setenv(name, value)
    assert SWEEP["metric"]["name"] == "epoch/val_top1"
    words = [*words_of_agent("args", {"optim.lr": 0.05, "batch_size": 128}), "--epochs=1", "data.per_class=20"]
    wandb = sys.modules.get("wandb") or pytest.importorskip("wandb")
    try:
        code, out, err = run(capsys, *words, "--out=run")
    finally:
        wandb.teardown()  # which keeps those variables otherwise
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["test"]["images"] == 359
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == "abc123"


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["train", "--lr=0.1"], ["train", "--lr=0.1"]),
        (["train", "--optim.lr=0.1"], ["train", "optim.lr=0.1"]),
        (["train", "--optim.lr", "0.1", "--seed", "1"], ["train", "optim.lr=0.1", "--seed", "1"]),
        (
            ["cycle", "--baseline.optim.lr=1", "--baseline_epochs=2"],
            ["cycle", "baseline.optim.lr=1", "--baseline-epochs=2"],
        ),
        (["train", "--pretrained=True", "--dry_run=false"], ["train", "--pretrained"]),
        (["train", "--pretrained", "False", "--json", "true"], ["train", "--json"]),
        (["train", "--pretrained", "--json", "epochs=1"], ["train", "--pretrained", "--json", "epochs=1"]),
        (["train", "--epochs", "3", "--epochs=3"], ["train", "--epochs", "3", "--epochs=3"]),
        (["train", "--", "--optim.lr=0.1"], ["train", "--", "--optim.lr=0.1"]),
        (["fuse", "--optim.lr=0.1"], ["fuse", "--optim.lr=0.1"]),
        (["train", "--no_such=1"], ["train", "--no_such=1"]),
        ([], []),
    ],
)
def test_words_become_what_a_person_would_type(words, typed):
    assert as_typed(words) == typed


def test_an_unknown_setting_in_that_form_is_named(capsys):
    words = ("train", "--model", "repvgg", "--dataset", "digits", "--optim.lrr=1")
    assert "unknown setting 'optim.lrr'; did you mean optim.lr" in one_line(capsys, *words)


def test_lists_come_as_python_writes_them():
    from repan_cli.config import SCHEMA

    assert SCHEMA["block.kernel"].parse("[3, 5]") == (3, 5)
    assert SCHEMA["run.trackers"].parse("['tensorboard', \"wandb\"]") == ("tensorboard", "wandb")
    assert TrainOptions().settings == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "no network: give --model NAME, see 'repan list models'",
            "no network: give model=NAME, see 'repan list models'",
        ),
        ("give --model net.py:net (files are not", "give model='net.py:net' (files are not"),
        ("give --block FILE.py:FUNCTION, or", "give block=FILE.py:FUNCTION, or"),
        ("with --init 'my run/last.pt'", "with init='my run/last.pt'"),
        ("--model is for a network of your own", "model=... is for a network of your own"),
        ("did you mean --data-root a/b?", "did you mean data_root='a/b'?"),
        ("--seed and --seeds cannot be combined", "seed=... and seeds=... cannot be combined"),
        ("what --control adds: give one", "what control=True adds: give one"),
        ("begin anew with -c run/config.yaml --out NEW", "begin anew with config='run/config.yaml' out=NEW"),
        ("resume it by repan cycle --resume run --model x", "resume it by repan cycle --resume run --model x"),
        ("the files of 'repan fuse --format timm'; --epochs", "the files of 'repan fuse --format timm'; epochs=..."),
        ("well--known -x --trust-code optim.lr=1", "well--known -x --trust-code optim.lr=1"),
    ],
)
def test_errors_name_the_arguments_of_python(text, expected):
    assert in_python(text, *_arguments(CycleOptions)) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "repvgg"}, "give dataset=NAME"),
        ({"dataset": "digits"}, "give model=NAME"),
        ({**NET, "seed": 1, "seeds": [1, 2]}, "seed=... and seeds=... cannot be combined"),
        ({"resume": "gone", "config": "recipes/cifar"}, "config=... cannot be combined with resume="),
        ({**NET, "lr": 0.1, "optim.lr": 0.2}, "lr=... and optim.lr= are the same setting"),
    ],
)
def test_no_error_of_a_function_names_an_option(given, says):
    with pytest.raises(InputError) as error:
        repan_cli.train(**given)
    assert says in str(error.value)
    assert "--" not in str(error.value)


def test_load_names_its_own_arguments(tmp_path):
    net = small_net()
    checkpoint.save(checkpoint.capture(net, card_of(net, "net.py:build")), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"give model='net.py:build' \(files"):
        repan_cli.load(tmp_path / "a.pt")
