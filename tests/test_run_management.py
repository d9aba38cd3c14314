"""Many runs: listed with the command that continues them, ended by patience or a time limit, started with the batch
that fits.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support import FP32, one_line, run, small_net, write_run

import repan_cli
from repan_cli import checkpoint, config, runs
from repan_cli.commands import early
from repan_cli.errors import InputError
from repan_cli.runs import studies
from repan_cli.runs.listing import runs_below
from repan_cli.session import batch_size, network, pace, teachers

SMALL = ("--model", "repvgg_a0_cifar", "--dataset", "digits", "data.per_class=12", "data.batch_size=32", "--lr", "0.01")


def status(folder, **facts):
    (folder / "status.json").write_text(json.dumps(facts))


# ---------------------------------------------------------------------------------------------- list runs


@pytest.fixture
def several(tmp_path, monkeypatch):
    """Runs in all states below `runs`, with a series among them."""
    monkeypatch.chdir(tmp_path)
    for name in ("done", "stopped", "killed", "lives", "reused", "elsewhere", "seeds/seed_0", "never saved"):
        folder = write_run(tmp_path / "runs" / "cycle" / name)
        (folder / "env.json").write_text(json.dumps({"argv": ["cycle"]}))
        if name != "never saved":
            (folder / "last.pt").write_bytes(b"x")
    runs = tmp_path / "runs" / "cycle"
    (runs / "seeds" / "config.yaml").write_text("epochs: 1\n")
    (runs / "seeds" / "series.json").write_text("{}")
    here = platform.node()
    status(runs / "stopped", state="interrupted", time="2026-01-01T00:00:00+00:00")
    status(runs / "killed", state="running", host=here, pid=2**22 + 1)
    status(runs / "lives", state="running", host=here, pid=os.getpid())
    status(runs / "reused", state="running", host=here, pid=os.getpid(), heartbeat="2026-01-01T00:00:00+00:00")
    status(runs / "elsewhere", state="running", host="far away", pid=1, heartbeat="2026-01-01T00:00:00+00:00")
    status(runs / "seeds" / "seed_0", state="preempted")
    status(runs / "never saved", state="failed")
    shutil.copytree(runs / "seeds" / "seed_0", runs / "seeds" / ".control_seed_0")
    return runs


def test_runs_are_listed_with_their_state_and_the_command_that_continues_them(several):
    found = {each.path.relative_to(several).as_posix(): each for each in runs_below(several)}
    states = {name: each.state for name, each in found.items()}
    assert states == {
        "done": "done",
        "stopped": "interrupted",
        "killed": "killed",
        "lives": "running",
        "reused": "killed",
        "elsewhere": "killed",
        "seeds/seed_0": "preempted",
        "never saved": "failed",
    }
    assert {name for name, each in found.items() if not each.go_on} == {"done", "lives", "never saved"}
    assert found["stopped"].go_on == f"repan cycle --resume {several}/stopped"
    assert found["seeds/seed_0"].go_on == f"repan cycle --resume {several}/seeds"
    assert (found["done"].best, found["done"].test) == (70.0, 70.0)
    assert list(found)[-1] in ("stopped", "elsewhere", "reused")  # the oldest last


def test_a_clock_that_was_set_back_is_reported(several, capsys):
    ahead = datetime.now().astimezone() + timedelta(hours=30)
    status(several / "stopped", state="interrupted", time=ahead.isoformat())
    _, out, _ = run(capsys, "list", "runs", "*stopped")
    assert "in the future" in out.splitlines()[1]
    assert "repan cycle --resume" in out
    status(several / "stopped", state="interrupted", time=datetime.now().astimezone().isoformat())
    _, out, _ = run(capsys, "list", "runs", "*stopped")
    assert re.search(r"\d s$", out.splitlines()[1].rstrip())


def test_own_networks_and_blocks_are_named_again(several):
    own = "model:\n  name: my net.py:build\nblock:\n  name: blocks.py:mine\n"
    (several / "stopped" / "config.yaml").write_text(own)
    (stopped,) = (each for each in runs_below(several) if each.path.name == "stopped")
    assert stopped.go_on.endswith("stopped --model 'my net.py:build' --block blocks.py:mine")


def test_the_list_is_a_table_and_json(several, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run(capsys, "list", "runs")
    assert "continue with: repan cycle --resume runs/cycle/stopped" in out.splitlines()
    _, out, _ = run(capsys, "list", "runs", "stopped", "--json")
    (facts,) = json.loads(out).values()
    assert (facts["state"], facts["best"]) == ("interrupted", 70.0)
    assert len(json.loads(run(capsys, "list", "runs", several / "seeds", "--json")[1])) == 1
    assert "no runs below runs match 'nothing'" in one_line(capsys, "list", "runs", "nothing")


def test_damaged_files_of_runs_hide_no_other(several):
    for name in ("status.json", "summary.json", "metrics.jsonl", "config.yaml", "env.json"):
        (several / "stopped" / name).write_bytes(b"\xff{")
    found = {each.path.name: each for each in runs_below(several)}
    assert found["stopped"].state == "not known"
    assert len(found) == 8


@pytest.fixture
def stopped_study(tmp_path, monkeypatch):
    """A study with a finished and a stopped run, and an older run that was stopped before it."""
    monkeypatch.chdir(tmp_path)
    for name in ("study/quick/plain/seed_0", "study/quick/plain/seed_1", "cycle/older"):
        folder = write_run(tmp_path / "runs" / name)
        (folder / "env.json").write_text(json.dumps({"command": "cycle"}))
        (folder / "last.pt").write_bytes(b"x")
    runs = tmp_path / "runs"
    (runs / "study" / "quick" / "plain" / "arm.yaml").write_text("epochs: 1\n")
    for name in ("study/quick/plain/seed_1", "cycle/older"):
        status(runs / name, state="preempted")
    os.utime(runs / "cycle" / "older" / "config.yaml", (1, 1))
    return Path("runs/study/quick")


AGAIN = "repan study quick --data-root 'my data'"


def test_a_study_is_continued_as_a_whole(stopped_study, capsys):
    studies.note(stopped_study, "stopped", AGAIN)
    code, out, _ = run(capsys, "list", "runs")
    assert code == 0
    assert out.splitlines()[0].split()[-2:] == ["part", "of"]
    rows = [line.split() for line in out.splitlines() if line.startswith("runs/")]
    assert sorted((row[0], row[-1]) for row in rows) == [
        ("runs/cycle/older", "-"),
        ("runs/study/quick/plain/seed_0", "runs/study/quick"),
        ("runs/study/quick/plain/seed_1", "runs/study/quick"),
    ]
    said = sorted(line for line in out.splitlines() if line.startswith("continue with"))
    assert said == ["continue with: repan cycle --resume runs/cycle/older", f"continue with: {AGAIN}"]
    assert one_line(capsys, "cycle", "--resume", "latest") == (
        "Error: the newest run, runs/study/quick/plain/seed_1, belongs to a study: give its directory to continue it "
        f"alone, or continue the study with: {AGAIN}\n"
    )
    assert f"continue it with: {AGAIN}" in one_line(capsys, "cycle", "--resume", stopped_study)


def test_a_study_that_stopped_between_two_runs_is_unfinished(stopped_study, capsys):
    status(stopped_study / "plain" / "seed_1", state="done")
    status(Path("runs/cycle/older"), state="done")
    studies.note(stopped_study, "stopped", AGAIN)
    assert f"continue with: {AGAIN}" in run(capsys, "list", "runs")[1].splitlines()
    assert AGAIN in one_line(capsys, "cycle", "--resume", "latest")
    studies.note(stopped_study, "done", AGAIN)
    assert "continue with" not in run(capsys, "list", "runs")[1]
    assert runs.find("cycle", "latest").parent == stopped_study / "plain"
    studies.note(stopped_study, "running", AGAIN)
    assert "continue with" not in run(capsys, "list", "runs")[1], "its process lives"


def test_an_older_study_names_its_folder(stopped_study, capsys):
    again = "repan study GRID --out runs/study/quick"
    assert f"continue with: {again}" in run(capsys, "list", "runs")[1].splitlines()
    assert again in one_line(capsys, "cycle", "--resume", "latest")


def test_a_series_that_stopped_between_two_runs_is_unfinished(several):
    (several / "seeds" / "seed_0" / "status.json").write_text('{"state": "done"}')
    status(several / "seeds", state="preempted")
    (found,) = (each for each in runs_below(several) if each.path.name == "seed_0")
    assert (found.go_on, found.part_of) == (f"repan cycle --resume {several}/seeds", several / "seeds")


# ---------------------------------------------------------------------------------------------- patience


def test_patience_ends_a_run_with_all_its_results(tmp_path, capsys, few_blocks):
    words = ("train", *SMALL, "--epochs", "30", "run.patience=1", "optim.lr=1e-6", "optim.warmup_epochs=0")
    words = [word for word in words if word not in ("--lr", "0.01")]
    code, _, err = run(capsys, *words, "--out", tmp_path / "run")
    assert code == 0, err
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert done < 30
    assert "ended after 1 epoch without a better validation top-1 (run.patience)" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ended_early"]
    assert summary["test"]["top1"] >= 0
    assert (tmp_path / "run" / "fused.pt").exists()
    assert "is finished" in one_line(capsys, "train", "--resume", tmp_path / "run")


def test_patience_needs_something_to_choose_by():
    with pytest.raises(InputError, match="run.patience needs a validation part"):
        config.build({"run.patience": "3", "data.val_fraction": "0"})


# ---------------------------------------------------------------------------------------------- a limit of hours


def test_a_limit_of_hours_saves_and_the_run_resumes(tmp_path, capsys, few_blocks):
    code, _, err = run(capsys, "train", *SMALL, "--epochs", "2", "run.max_hours=1e-9", "--out", tmp_path / "run")
    assert code == 75
    assert "Stopped: after run.max_hours=1e-09, everything is saved; continue with: repan train --resume" in err
    code, _, err = run(capsys, "train", "--resume", tmp_path / "run", "run.max_hours=1")
    assert code == 0, err
    stored = checkpoint.load(tmp_path / "run" / "last.pt").card.config
    assert stored["run.max_hours"] == 1


def test_the_limit_counts_hours():
    now = [0.0]
    limit = pace.TimeLimit(0.5, now=lambda: now[0])
    assert not limit.passed()
    now[0] = 1800.0
    assert limit.passed()
    assert not pace.TimeLimit(None).passed()


# ---------------------------------------------------------------------------------------------- batches


def chosen(digits, free, monkeypatch, caplog):
    monkeypatch.setattr(batch_size, "_free", lambda device: free)
    given = config.build({"data.batch_size": "auto"})
    found = batch_size.resolved(given, small_net(in_chans=1), digits, FP32).data.batch_size
    assert f"data.batch_size=auto is {found}:" in caplog.text
    caplog.clear()
    return found


def test_the_largest_batch_that_fits_is_taken(digits, monkeypatch, caplog):
    small = dataclasses.replace(digits, image_size=8)
    sizes = [chosen(small, free, monkeypatch, caplog) for free in (2**23, 2**24, 2**25)]
    assert [size * 2 for size in sizes[:-1]] == sizes[1:]
    assert all(size & (size - 1) == 0 for size in sizes)
    most = chosen(small, 2**40, monkeypatch, caplog)
    assert len(digits.train.labels) // (2 * batch_size.STEPS) < most <= len(digits.train.labels) // batch_size.STEPS
    with pytest.raises(InputError, match="not even two images fit"):
        chosen(small, 2**10, monkeypatch, caplog)


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def fits(number):
        tried.append(number)
        return number <= 300

    assert batch_size.largest(1024, fits) == 256
    assert tried == [1024, 512, 256]
    assert batch_size.largest(1024, lambda number: False) == 0


def test_trying_changes_neither_the_network_nor_what_is_drawn(digits):
    import torch

    network = small_net(in_chans=1).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    batch_size.resolved(config.build({"data.batch_size": "auto"}), network, digits, FP32)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_auto_is_a_word_in_files_and_numbers_below_two_are_none():
    auto = config.build({"data.batch_size": "auto"})
    assert "batch_size: auto" in config.dump(auto)
    assert config.build(config.parse_yaml(config.dump(auto), "auto")) == auto
    for text in ("0", "1", "-1"):
        with pytest.raises(InputError, match="data.batch_size"):
            config.build({"data.batch_size": text})


def test_a_run_keeps_the_batch_that_was_found(tmp_path, capsys, few_blocks):
    words = [word for word in SMALL if not word.startswith("data.batch")]
    code, _, err = run(capsys, "train", *words, "--batch-size", "auto", "--epochs", "1", "--out", tmp_path / "run")
    assert code == 0, err
    found = checkpoint.load(tmp_path / "run" / "last.pt").card.config["data.batch_size"]
    assert f"data.batch_size=auto is {found}: " in err
    assert f"batch_size: {found}" in (tmp_path / "run" / "config.yaml").read_text()


# ---------------------------------------------------------------------------------------------- a run as weights


def test_a_runs_folder_is_accepted_wherever_weights_are(small_run, few_blocks, digits, tmp_path, capsys):
    folder = small_run.folder
    expected = checkpoint.load(folder / "best.pt").digest()
    assert checkpoint.load(folder).digest() == expected
    assert repan_cli.load(folder).training is False
    found = teachers.find_teacher(config.TeacherConfig(name=str(folder)), digits)
    assert found.digest == expected
    given = config.build({"model.init": str(folder), "data.name": "digits"})
    assert network.read_weights(given).digest() == expected
    early.check("train", "train", config.resolve("train", None, {"model.init": str(folder), "data.name": "digits"}))
    (tmp_path / "empty").mkdir()
    words = ("train", "--model", "repvgg", "--dataset", "digits", "--init", tmp_path / "empty")
    assert "is a folder without best.pt or last.pt: name a file in it" in one_line(capsys, *words)
