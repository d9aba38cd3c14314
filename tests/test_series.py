"""Several runs by one command: each is the run that it would be alone, a stop costs nothing, and all are compared."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from support import StopAt, assert_same, one_line, page_of, run

from repan_cli import runs
from repan_cli.commands import series
from repan_cli.session import build, summary
from repan_cli.system.signals import StopSignals
from repan_cli.training import optim

pytestmark = pytest.mark.usefixtures("few_blocks")

SMALL = [
    "--model",
    "repvgg_a0",
    "--dataset",
    "digits",
    "--epochs",
    "1",
    "data.batch_size=64",
    "data.per_class=30",
    "run.precision=fp32",
]
CYCLE = [*SMALL, "--baseline-epochs", "1", "--cycles", "1", "--lr", "0.001", "ema.enabled=true", "optim.name=adamw"]
CYCLE += ["--teacher", "previous", "cycle.start_from=best"]
TRAIN = [*SMALL, "--lr", "0.02"]
OWN = """from torch import nn


def build(num_classes, in_chans):
    conv, norm = nn.Conv2d(in_chans, 4, 3, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""
STEPS = 6
"""Updates an epoch."""


def done(capsys, *words):
    code, out, err = run(capsys, *words)
    assert code == 0, err
    return out, err


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def state_of(folder):
    return json.loads((folder / "status.json").read_text())["state"]


def assert_same_run(folder, expected, tmp_path):
    """To the last bit, but for what a summary says of a control."""
    copies = []
    for number, path in enumerate((folder, expected)):
        copies.append(tmp_path / f"copy_{path.name}_{number}")
        shutil.copytree(path, copies[-1])
        summary = {key: value for key, value in summary_of(path).items() if key != "control"}
        (copies[-1] / "summary.json").write_text(json.dumps(summary))
    assert_same(*copies)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A series of a run and its control for each of two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("series") / "both"
    made = {}

    def of(capsys):
        if not made:
            words = [*CYCLE, "--control", "--seeds", "3,4", "--json", "--out", folder]
            made["out"], made["err"] = done(capsys, "cycle", *words)
        return folder, json.loads(made["out"]), made["err"]

    return of


# ---------------------------------------------------------------------------------------------- with a control


@pytest.mark.soak
def test_every_run_and_every_control_is_the_same_as_alone(capsys, tmp_path, controlled):
    folder, _, _ = controlled(capsys)
    done(capsys, "cycle", *CYCLE, "--seed", 4, "--out", tmp_path / "alone")
    done(capsys, "cycle", *CYCLE, "--seed", 4, "cycle.restart=none", "--out", tmp_path / "control")
    assert_same_run(folder / "seed_4", tmp_path / "alone", tmp_path)
    assert_same_run(folder / "control_seed_4", tmp_path / "control", tmp_path)
    ours, alone = ((path / "config.yaml").read_text() for path in (folder / "control_seed_4", tmp_path / "control"))
    assert re.sub("out: .*", "", ours) == re.sub("out: .*", "", alone)


@pytest.mark.soak
def test_the_control_does_not_train_the_baseline_again(capsys, controlled):
    folder, _, err = controlled(capsys)
    log = (folder / "control_seed_3" / "log.txt").read_text()
    assert "cycle 1/1: no restart (control)" in log
    assert not re.search(r"baseline +1/1", log)
    assert "continues from the end of the baseline of seed_3" in err


@pytest.mark.slow
def test_the_end_compares(capsys, controlled):
    folder, found, err = controlled(capsys)
    assert found["out"] == str(folder)
    names = ["seed_3", "control_seed_3", "seed_4", "control_seed_4"]
    assert [row["run"] for row in found["runs"]] == [str(folder / name) for name in names]
    ours, theirs = found["runs"][0], found["runs"][1]
    assert ours["control"]["gain"] == ours["test"]["top1"] - theirs["test"]["top1"]
    assert ours["control"]["last_gain"] == ours["cycles"][-1]["test_top1"] - theirs["cycles"][-1]["test_top1"]
    assert summary_of(folder / "seed_3")["control"] == ours["control"]
    assert "control" not in theirs
    control, repan = found["comparison"]["groups"]
    assert [control["label"], repan["label"]] == ["cycle.restart=none", "cycle.restart=repan"]
    assert repan["seeds"] == control["seeds"] == [3, 4]
    gains = [found["runs"][n]["test"]["top1"] - found["runs"][n + 1]["test"]["top1"] for n in (0, 2)]
    assert repan["difference"]["test_top1"]["mean"] == pytest.approx(sum(gains) / 2)
    assert repan["difference"]["test_top1"]["method"] == "paired"
    assert f"seed 3: test top-1 {ours['test']['top1']:.2f} (difference from its control {gains[0]:+.2f})" in err
    assert json.loads((folder / "comparison.json").read_text()) == found["comparison"]
    assert "cycle.restart=repan" in (folder / "comparison.html").read_text()
    assert state_of(folder) == "done"


def test_its_folder_is_a_folder_of_runs(capsys, controlled):
    folder, found, _ = controlled(capsys)
    out, _ = done(capsys, "compare", folder, "--json")
    assert json.loads(out)["groups"] == found["comparison"]["groups"]
    assert "svg" in page_of(capsys, folder)


def test_a_finished_series_is_only_compared_again(capsys, controlled):
    folder, found, _ = controlled(capsys)
    weights = folder / "seed_3" / "last.pt"
    before = weights.stat().st_mtime_ns
    out, err = done(capsys, "cycle", "--resume", folder, "--json")
    assert json.loads(out) == found
    assert "run 1" not in err
    assert weights.stat().st_mtime_ns == before


@pytest.mark.soak
def test_with_weights_to_start_from_there_is_no_baseline_to_share(capsys, tmp_path, controlled):
    words = ["--init", controlled(capsys)[0] / "seed_3" / "cycle_00.pt", "--dataset", "digits", "data.batch_size=256"]
    words += ["--cycles", 1, "--epochs", 1, "run.precision=fp32"]
    out, _ = done(capsys, "cycle", *words, "--control", "--seed", 5, "--json", "--out", tmp_path / "run")
    ours, theirs = json.loads(out)["runs"]
    assert ours["baseline"] == theirs["baseline"]
    assert (ours["seed"], theirs["seed"]) == (5, 5)
    assert ours["cycles"][0]["logit_error"] > 0
    assert theirs["cycles"][0]["logit_error"] == 0


def test_a_network_of_ones_own_has_a_control(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(OWN)
    words = ["-m", "net.py:build", "-d", "digits", "data.batch_size=256", "--baseline-epochs", 1, "--epochs", 1]
    done(capsys, "cycle", *words, "--cycles", 1, "--control", "--out", "run")
    assert [state_of(path) for path in sorted(Path("run").glob("*seed_0"))] == ["done", "done"]


# ---------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("at", "number", "code", "stopped_in", "seeds"),
    [
        pytest.param(3, signal.SIGTERM, 75, "seed_3", (3,), marks=pytest.mark.soak),
        pytest.param(STEPS + 2, signal.SIGINT, 130, "seed_3", (3,), marks=pytest.mark.soak),
        pytest.param(2 * STEPS + 2, signal.SIGUSR1, 75, "control_seed_3", (3,), marks=pytest.mark.soak),
        pytest.param(3 * STEPS + 4, signal.SIGTERM, 75, "seed_4", (3, 4), marks=pytest.mark.soak),
    ],
)
def test_a_stopped_series_resumes_to_the_same_end(capsys, tmp_path, controlled, at, number, code, stopped_in, seeds):
    expected, _, _ = controlled(capsys)
    folder = tmp_path / "series"
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, at, number=number)
        words = ["--control", "--seeds", ",".join(map(str, seeds)), "--json", "--out", folder]
        left, out, err = run(capsys, "cycle", *CYCLE, *words)
    assert (left, out) == (code, "")
    assert f"Stopped: {stopped_in}: " in err
    assert err.rstrip().endswith(f"continue with: repan cycle --resume {folder}")
    assert state_of(folder) == ("interrupted" if code == 130 else "preempted")
    finished = [path for path in folder.glob("*seed*") if state_of(path) == "done"]
    before = {path: (path / "last.pt").stat().st_mtime_ns for path in finished}
    done(capsys, "cycle", "--resume", folder)
    assert {path: (path / "last.pt").stat().st_mtime_ns for path in finished} == before
    assert state_of(folder) == "done"
    for name in (f"{kind}seed_{seed}" for seed in seeds for kind in ("", "control_")):
        assert_same_run(folder / name, expected / name, tmp_path)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.soak), (signal.SIGINT, 130)]
)
def test_a_signal_while_a_run_is_ending_stops_before_the_next(capsys, tmp_path, monkeypatch, number, code):
    draw = summary.draw

    def drawn(*arguments):
        os.kill(os.getpid(), number)
        draw(*arguments)

    monkeypatch.setattr(summary, "draw", drawn)
    folder = tmp_path / "series"
    left, _, err = run(capsys, "train", *TRAIN, "--seeds", "0,1", "--out", folder)
    assert left == code
    assert f"continue with: repan train --resume {folder}" in err
    assert state_of(folder / "seed_0") == "done"
    assert not (folder / "seed_1").exists()
    monkeypatch.undo()
    out, _ = done(capsys, "train", "--resume", folder, "--json")
    assert [row["seed"] for row in json.loads(out)["runs"]] == [0, 1]


def test_ctrl_c_before_a_run_has_begun_says_how_to_continue(capsys, tmp_path, monkeypatch):
    prepare, calls = build.prepare, []

    def impatient(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepare(*arguments)

    monkeypatch.setattr(series, "prepare", impatient)
    code, _, err = run(capsys, "train", *TRAIN, "--seeds", "0,1", "--out", tmp_path / "series")
    assert code == 130
    assert f"interrupted before seed_1 began; continue with: repan train --resume {tmp_path / 'series'}" in err


def test_inside_another_a_stop_is_heard_by_both():
    with StopSignals() as outer:
        with StopSignals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.received == outer.received == signal.SIGTERM
        with StopSignals() as later:
            assert later.received == signal.SIGTERM
    with StopSignals() as fresh:
        assert not fresh()


def test_what_was_killed_before_it_had_a_state_is_restarted(capsys, tmp_path):
    folder = tmp_path / "series"
    done(capsys, "train", *TRAIN, "--seeds", "0,1", "--out", folder)
    shutil.rmtree(folder / "seed_1")
    (folder / "seed_1").mkdir()
    (folder / "seed_1" / "config.yaml").write_text("half a fi")
    done(capsys, "train", "--resume", folder)
    assert summary_of(folder / "seed_1")["seed"] == 1


@pytest.mark.soak
def test_a_half_made_control_is_made_again(capsys, tmp_path):
    """Of a process that was killed while it copied."""
    folder = tmp_path / "series"
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        run(capsys, "cycle", *CYCLE, "--control", "--out", folder)
    (folder / ".control_seed_0").mkdir()
    (folder / ".control_seed_0" / "best.pt").write_text("half")
    done(capsys, "cycle", "--resume", folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"seed_0", "control_seed_0"}


def test_a_control_whose_start_is_lost_trains_the_baseline_itself(capsys, tmp_path, controlled):
    folder, _, _ = controlled(capsys)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "control_seed_3")
    _, err = done(capsys, "cycle", "--resume", copy)
    assert re.search(r"baseline +1/1", err)
    assert_same_run(copy / "control_seed_3", folder / "control_seed_3", tmp_path)


@pytest.mark.soak
def test_one_run_of_a_series_can_be_resumed_by_itself(capsys, tmp_path, controlled):
    expected, _, _ = controlled(capsys)
    folder = tmp_path / "series"
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        run(capsys, "cycle", *CYCLE, "--control", "--seeds", "3", "--out", folder)
    done(capsys, "cycle", "--resume", folder / "seed_3")
    assert state_of(folder / "control_seed_3") == "waiting"
    assert "not finished (waiting)" in run(capsys, "compare", folder)[2]
    done(capsys, "cycle", "--resume", folder)
    assert_same_run(folder / "control_seed_3", expected / "control_seed_3", tmp_path)


def test_a_seed_that_diverges_does_not_keep_the_others_from_training(capsys, tmp_path, monkeypatch):
    step, broken = optim.step_if_finite, []

    def breaking(optimizer, norm):
        if not broken:
            broken.append(True)
            return step(optimizer, norm * float("nan"))
        return step(optimizer, norm)

    monkeypatch.setattr(optim, "step_if_finite", breaking)
    folder = tmp_path / "series"
    code, out, err = run(capsys, "train", *TRAIN, "--seeds", "0,1", "--json", "--out", folder)
    assert code == 3
    assert "Warning: seed_0 diverged: " in err
    assert "Error: 1 run of 2 diverged: seed_0" in err
    assert [row["seed"] for row in json.loads(out)["runs"]] == [1]
    assert (state_of(folder / "seed_0"), state_of(folder / "seed_1")) == ("diverged", "done")


# ---------------------------------------------------------------------------------------------- the command line


def test_settings_that_change_the_result_cannot_change_in_the_middle(capsys, controlled):
    folder, _, _ = controlled(capsys)
    for words in (["--lr", "0.5"], ["--cycles", "2"], ["--model", "resnet18"], ["--teacher", "other.pt"]):
        assert "cannot change when --seeds or --control is resumed" in one_line(
            capsys, "cycle", "--resume", folder, *words
        )
    done(capsys, "cycle", "--resume", folder, "data.workers=0", "--lr", "0.001")
    assert "resume them with that command" in one_line(capsys, "train", "--resume", folder)
    for option, value in (("--seeds", "1"), ("--control", None)):
        words = [option] if value is None else [option, value]
        assert f"{option} cannot be combined with --resume" in one_line(capsys, "cycle", "--resume", folder, *words)


def test_the_same_command_again_offers_to_resume(capsys, controlled):
    folder, _, _ = controlled(capsys)
    err = one_line(capsys, "cycle", *CYCLE, "--seeds", "3,4", "--out", folder)
    assert f"already exists; nothing was changed: continue with --resume {folder}" in err


def test_a_network_of_ones_own_is_named_again(capsys, tmp_path):
    (tmp_path / "net.py").write_text(OWN)
    words = [f"{tmp_path / 'net.py'}:build", *TRAIN[2:]]
    folder = tmp_path / "series"
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        code, _, err = run(capsys, "train", "--model", *words, "--seeds", "0,1", "--out", folder)
    assert code == 75
    assert err.rstrip().endswith(f"--resume {folder} --model {words[0]}")
    assert "files are not imported automatically" in one_line(capsys, "train", "--resume", folder)
    (tmp_path / "net.py").rename(tmp_path / "moved.py")
    done(capsys, "train", "--resume", folder, "--model", f"{tmp_path / 'moved.py'}:build")
    assert summary_of(folder / "seed_1")["seed"] == 1


def test_a_damaged_description_of_a_series_is_one_line(capsys, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / runs.SERIES).write_text('{"seeds": [1]}')
    assert "series.json is damaged" in one_line(capsys, "cycle", "--resume", tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seeds", "0,x"], "--seeds 0,x: 'x' is not a whole number; give numbers such as 0,1,2"),
        (["--seeds", ""], "--seeds : '' is not a whole number"),
        (["--seeds", "1,-2"], "must be at least 0"),
        (["--seeds", "1,2,1"], "a seed is given twice"),
        (["--seeds", "1,2", "--seed", "1"], "--seed and --seeds"),
        (
            ["--control", "cycle.restart=none"],
            "cycle.restart=none and --control both ask for a run without restarts: give one",
        ),
        (["--control", "cycle.restart=rescale", "--dry-run"], "cycle.restart=rescale and --control both ask"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in one_line(capsys, "cycle", "--model", "repvgg", "--dataset", "digits", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_built_leaves_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "nonsense", "--dataset", "digits", "--seeds", "0,1", "--out", "series"]
    assert "nonsense" in one_line(capsys, "train", *words)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start each run separately under torchrun" in one_line(
        capsys, "cycle", *CYCLE, "--control", "--out", tmp_path / "a"
    )


def test_without_out_the_folder_is_named_after_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(capsys, "train", *TRAIN, "--seeds", "7")
    (folder,) = (tmp_path / "runs" / "train").iterdir()
    assert folder.name.endswith("-repvgg_a0_cifar-repvgg-digits")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["seed_7"]
    out, err = done(capsys, "train", "--resume", "latest", "--json")
    assert json.loads(out)["runs"][0]["seed"] == 7
    assert err.startswith(f"all runs of runs/train/{folder.name} are finished already; their comparison:")


def test_a_dry_run_is_one_run_and_says_of_how_many(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = done(capsys, "cycle", *CYCLE, "--seeds", "0,1,2", "--control", "--dry-run")
    assert "for each of 6 runs" in out
    out, _ = done(capsys, "cycle", *CYCLE, "--control", "--dry-run", "--json")
    assert json.loads(out)["runs"] == 2
    assert list(tmp_path.iterdir()) == []


def test_printed_settings_are_those_of_the_first_run(capsys):
    out, _ = done(capsys, "cycle", *CYCLE, "--seeds", "7,8", "--control", "--print-config")
    assert "seed: 7" in out
    assert "restart: repan" in out
