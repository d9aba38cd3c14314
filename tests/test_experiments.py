"""The runner of the experiments: which runs it makes and in which order, how it stops and goes on, and its table.

Most tests put a script of a few lines in the place of repan, which notes what it is called with.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT

fcntl = pytest.importorskip("fcntl", reason="the runner is for Linux and macOS")

RUNNER = ROOT / "configs" / "experiments" / "run.py"

STUB = """
import json, os, pathlib, signal, sys, time
words, here = sys.argv[1:], pathlib.Path(__file__).parent
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([words, os.environ.get("OMP_NUM_THREADS"), cores]) + "\\n")
if words[0] == "compare":
    sys.exit()
run = pathlib.Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
def leave(state, code):
    (run / "status.json").write_text(json.dumps({"state": state}))
    sys.exit(code)
run.mkdir(parents=True, exist_ok=True)
(run / "last.pt").touch()
signal.signal(signal.SIGTERM, lambda *_: leave("preempted", 75))
(run / "status.json").write_text(json.dumps({"state": "running"}))
end = here / f"{run.parent.name}_{run.name}"
if end.exists() and "--resume" not in words:
    code = int(end.read_text())
    if code == 75:
        time.sleep(60)
    leave("diverged" if code == 3 else "failed", code)
(run / "summary.json").write_text('{"test": {"top1": 50}, "seconds": 60}')
leave("done", 0)
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The runner as a module, with the script in the place of repan."""
    spec = importlib.util.spec_from_file_location("experiments_runner", RUNNER)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(module, "REPAN", (sys.executable, "-S", str(tmp_path / "stub.py")))
    monkeypatch.setattr(os, "nice", lambda more: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(runner, tmp_path, monkeypatch, capsys):
    """Calls the runner: its exit code, what it said, and the calls of repan that it made."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "out"), *map(str, words)])
        (tmp_path / "calls").write_text("")
        code = runner.main()
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return code, capsys.readouterr().err, calls

    return call


def made(calls):
    """The command, whether it goes on, and the folder, of each run."""
    runs = [words for words, *_ in calls if words[0] != "compare"]
    return [
        (
            words[0],
            "--resume" in words,
            "/".join(words[words.index("--resume" if "--resume" in words else "--out") + 1].split("/")[-2:]),
        )
        for words in runs
    ]


TWO = ("--arms", "continuous_zero,one_cosine", "--seeds", "0,1")


def test_all_arms_have_their_turn_with_a_seed_before_the_next_seed(run, tmp_path):
    code, err, calls = run(*TWO)
    assert code == 0, err
    assert made(calls) == [
        ("cycle", False, "continuous_zero/seed_0"),
        ("train", False, "one_cosine/seed_0"),
        ("cycle", False, "continuous_zero/seed_1"),
        ("train", False, "one_cosine/seed_1"),
    ]
    first, last = calls[0][0], calls[-1][0]
    out = tmp_path / "out"
    assert first[1:] == [
        "-c",
        "experiments/continuous_zero",
        "--seed",
        "0",
        "--out",
        str(out / "continuous_zero/seed_0"),
    ]
    assert last == [
        "compare",
        str(out),
        "--by-folder",
        "--control",
        str(out / "one_cosine"),
        "--markdown",
        str(out / "results.md"),
    ]
    assert "one_cosine seed 1: test top-1 50.00 after 1.0 minutes" in err
    code, _, calls = run(*TWO)
    assert (code, made(calls)) == (0, [])


def test_the_table_has_the_controls_that_are_finished(run, tmp_path):
    (tmp_path / "continuous_none_seed_0").write_text("3")
    _, _, calls = run("--arms", "full_restart_none,restart_zero,restart_none,continuous_none,one_cosine", "--seeds", 0)
    words = calls[-1][0]
    controls = [words[place + 1].rpartition("/")[2] for place, word in enumerate(words) if word == "--control"]
    assert controls == ["one_cosine", "restart_none", "full_restart_none"]


def test_by_default_every_small_arm_runs_controls_first(runner):
    given = runner.read_words(["out"])
    assert given.arms[:3] == ["one_cosine", "continuous_none", "restart_none"]
    assert set(given.arms) == {arm for arm in runner.ARMS if not arm.startswith(("full_", "whole_"))}
    assert len(given.arms) == 19
    assert (given.seeds, given.jobs, given.minutes) == ([0, 1, 2], 1, math.inf)
    assert len(runner.read_words(["out", "--arms", "full_*"]).arms) == 7


def test_what_stands_behind_the_dashes_goes_to_the_runs_that_read_it(run):
    passed_on = ["--data-root", "there", "epochs=1", "cycle.count=1", "baseline.epochs=2", "teacher.alpha=1"]
    _, _, calls = run(*TWO, "--", *passed_on)
    for words, *_ in calls[:-1]:
        assert words[-6 if words[0] == "cycle" else -3 :] == (passed_on if words[0] == "cycle" else passed_on[:3])


def test_a_run_that_diverged_is_noted_and_left(run, tmp_path):
    (tmp_path / "one_cosine_seed_0").write_text("3")
    for runs_left in (4, 0):
        code, err, calls = run(*TWO)
        assert code == 3
        assert len(made(calls)) == runs_left
        assert "diverged: one_cosine seed 0" in err


def test_a_run_that_fails_ends_it_with_its_exit_code(run, tmp_path):
    (tmp_path / "one_cosine_seed_0").write_text("2")
    code, err, calls = run(*TWO)
    assert (code, len(made(calls))) == (2, 2)
    assert f"(see {tmp_path / 'out' / 'one_cosine' / 'seed_0.log'})" in err
    assert calls[-1][0][0] == "compare"


def test_it_stops_in_time_and_the_same_command_goes_on(run, tmp_path):
    code, err, calls = run(*TWO, "--minutes", 0)
    assert (code, calls) == (75, [])
    (tmp_path / "one_cosine_seed_0").write_text("75")
    code, err, calls = run(*TWO, "--minutes", 2 / 60)
    assert (code, len(made(calls))) == (75, 2)
    assert "one_cosine seed 0: stopped, to go on later" in err
    assert err.splitlines()[-1].startswith(f"go on with: python run.py {tmp_path / 'out'} --arms continuous_zero,one")
    code, err, calls = run(*TWO)
    assert code == 0
    assert made(calls)[0] == ("train", True, "one_cosine/seed_0")
    assert len(made(calls)) == 3


def test_several_at_once_have_a_core_each(run):
    _, _, calls = run(*TWO, "--jobs", 2)
    assert len(made(calls)) == 4
    for _, threads, cores in calls[:-1]:
        assert (threads, cores) == ("1", 1)


def test_what_was_killed_before_its_first_save_begins_anew_unless_it_lives(run, tmp_path):
    folder = tmp_path / "out" / "one_cosine" / "seed_0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="is being written by another process"):
            run("--arms", "one_cosine", "--seeds", 0)
    code, _, calls = run("--arms", "one_cosine", "--seeds", 0)
    assert (code, made(calls)) == (0, [("train", False, "one_cosine/seed_0")])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--arms", "one_sine"), "no arm 'one_sine'; there are continuous_2x20"),
        (("--seeds", "a"), "--seeds"),
        (("--jobs", "0"), "--jobs 0 is less than 1"),
    ],
)
def test_bad_words_are_said(runner, capsys, words, says):
    with pytest.raises(SystemExit) as left:
        runner.read_words(["out", *words])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


SHORT = "--dataset digits --model repvgg_a0_cifar --epochs 3 data.classes=10 data.per_class=60 data.image_size=null"
SHORT += " data.batch_size=64 run.precision=fp32"


def of_repan(arms, tmp_path, *settings):
    """The words that start the runner as it is, on a few digits; and where."""
    words = [sys.executable, str(RUNNER), "out", "--arms", arms, "--seeds", "0", "--", *SHORT.split(), *settings]
    return words, {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}


def test_a_real_run_is_made_and_compared(tmp_path):
    words, place = of_repan("one_cosine", tmp_path)
    words[words.index("--epochs") + 1] = "1"
    done = subprocess.run(words, capture_output=True, timeout=120, **place)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert rows[2].startswith("| one_cosine | ")
    assert rows[2].endswith("| cpu |")
    summary = json.loads((tmp_path / "out" / "one_cosine" / "seed_0" / "summary.json").read_text())
    assert summary["images"] == {"train": 540, "val": 60, "test": 359}


@pytest.mark.soak
def test_real_runs_are_stopped_gone_on_with_and_compared(tmp_path):
    """Two arms on a few digits; SIGTERM in the first of them."""
    arms = "continuous_zero,one_cosine"
    words, place = of_repan(arms, tmp_path, "baseline.epochs=2", "cycle.count=1")
    stopped = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place)
    metrics = tmp_path / "out" / "continuous_zero" / "seed_0" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    stopped.terminate()
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, err
    assert "continuous_zero seed 0: stopped, to go on later" in err
    assert not (tmp_path / "out" / "results.md").exists()
    done = subprocess.run(words, capture_output=True, timeout=120, **place)
    assert done.returncode == 0, done.stderr
    assert "continuous_zero seed 0: goes on" in done.stderr
    rows = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:4]] == ["| one_cosine", "| continuous_zero"]
    assert " | control | 3 | " in rows[2]
    assert rows[3].endswith("| cpu |")
    summary = json.loads((tmp_path / "out" / "continuous_zero" / "seed_0" / "summary.json").read_text())
    assert summary["images"] == {"train": 540, "val": 60, "test": 359}
    assert len(metrics.read_text().splitlines()) == 5
