"""`repan study`: which runs it makes and in which order, how it stops and continues, its table, and bad grids.

Most tests put a script of a few lines in the place of repan, which notes what it is called with.
"""

import json
import os
import signal
import sys
import threading
import time

import pytest
from support import ROOT, run, start, write_run

from repan_cli import config
from repan_cli.config.grid import grids, read_grid
from repan_cli.runs import processes, studies
from repan_cli.system import notices
from repan_cli.training.plan import cycle_plan, training_plan

GRID = """
about: two arms
seeds: [0, 1]
settings:
  model: {name: repvgg_a0_cifar}
  data: {name: digits}
  epochs: 2
arms:
  restarts:
    about: a baseline and a cycle
    settings: {baseline: {epochs: 1}, cycle: {count: 1}}
  plain:
    about: one cosine
    command: train
    control: true
"""

STUB = """
import json, os, pathlib, signal, sys, time
words, here = sys.argv[1:], pathlib.Path(__file__).parent
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([words, os.environ.get("OMP_NUM_THREADS"), cores]) + "\\n")
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
    if code == -75:
        leave("preempted", 75)
    if code == 75:
        (here / "waits").touch()
        time.sleep(60)
    print("Error: the last line")
    leave("diverged" if code == 3 else "failed", code)
(run / "summary.json").write_text('{"test": {"top1": 50}, "seconds": 60}')
leave("done", 0)
"""


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """Calls `repan study` with the script in the place of repan: its exit code, what it said, and the calls it made."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.setattr(processes, "REPAN", (sys.executable, "-S", str(tmp_path / "stub.py")))
    monkeypatch.setattr(processes, "POLL", 0.01)
    monkeypatch.setattr(notices, "_SAID", set())
    monkeypatch.chdir(tmp_path)

    def call(*words):
        (tmp_path / "calls").write_text("")
        code, out, err = run(capsys, "study", "grid.yaml", "--out", "out", *words)
        return code, out, err, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return call


def made(calls):
    """The command, whether it continues, and the folder, of each run."""
    found = []
    for words, *_ in calls:
        option = "--resume" if "--resume" in words else "--out"
        found.append((words[0], option == "--resume", words[words.index(option) + 1].removeprefix("out/")))
    return found


ALL = [
    ("train", False, "plain/seed_0"),
    ("cycle", False, "restarts/seed_0"),
    ("train", False, "plain/seed_1"),
    ("cycle", False, "restarts/seed_1"),
]


def test_all_arms_run_with_a_seed_before_the_next_seed_and_once(study, tmp_path):
    code, _, err, calls = study()
    assert code == 0, err
    assert made(calls) == ALL
    assert calls[1][0] == ["cycle", "-c", "out/restarts/arm.yaml", "--seed", "0", "--out", "out/restarts/seed_0"]
    assert "plain seed 1: test top-1 50.00 after 1 min 00 s" in err
    settings = config.resolve("cycle", str(tmp_path / "out/restarts/arm.yaml"), {}).config
    assert (settings.epochs, settings.cycle.count, settings.model.name) == (2, 1, "repvgg_a0_cifar")
    code, _, _, calls = study()
    assert (code, made(calls)) == (0, [])


def test_arms_and_seeds_are_chosen(study):
    *_, calls = study("--arms", "restart*", "--seeds", "7,3")
    assert made(calls) == [("cycle", False, "restarts/seed_7"), ("cycle", False, "restarts/seed_3")]


def test_settings_go_to_the_arms_that_read_them(study):
    code, *_, calls = study("--data-root", "there", "cycle.attach=ramp", "--seeds", "0")
    assert code == 0
    given = {words[0]: words[7:] for words, *_ in calls}
    assert given == {"train": ["data.root=there"], "cycle": ["cycle.attach=ramp", "data.root=there"]}


def test_changed_settings_are_refused_except_those_of_the_machine(study):
    study("--seeds", "0", "--data-root", "here")
    code, _, err, calls = study("epochs=3", "--data-root", "there")
    assert (code, calls) == (2, [])
    assert err.strip() == (
        "Error: arm plain: epochs is 3, but its runs in out/plain were made with 2: give another --out"
    )
    code, *_, calls = study("--data-root", "there")
    assert (code, len(calls)) == (0, 2)


def test_a_run_that_diverged_is_noted_and_left(study, tmp_path):
    (tmp_path / "plain_seed_0").write_text("3")
    for runs_made in (4, 0):
        code, _, err, calls = study()
        assert (code, len(calls)) == (3, runs_made)
        assert "1 run of 4 diverged: plain seed 0" in err


def test_the_results_name_the_runs_that_are_missing(study, tmp_path):
    """The mean of an arm without the seed that diverged looks better than the arm is."""
    for arm, restart in (("plain", "none"), ("restarts", "repan")):
        for seed in (0, 1):
            write_run(tmp_path / "out" / arm / f"seed_{seed}", seed, 70 + seed, cycle__restart=restart)
    lost = tmp_path / "out" / "restarts" / "seed_1" / "status.json"
    lost.write_text('{"state": "diverged"}')
    assert study()[0] == 3
    for name in ("results.md", "results.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "left out: out/restarts/seed_1: its loss diverged" in text
        assert "not finished" not in text
    lost.write_text('{"state": "failed"}')
    (lost.parent / "last.pt").touch()
    (tmp_path / "restarts_seed_1").write_text("2")
    assert study("--minutes", "1e-9")[0] == 75
    assert "left out: out: 1 run of 4 not finished" in (tmp_path / "out" / "results.md").read_text()


def test_a_run_that_fails_ends_the_study(study, tmp_path):
    (tmp_path / "plain_seed_0").write_text("2")
    code, _, err, calls = study()
    assert (code, len(calls)) == (1, 1)
    assert "failed with exit code 2: Error: the last line" in err
    assert "Error: plain seed 0 failed, see out/plain/seed_0.log; continue the study with: repan" in err


def test_a_run_that_stopped_by_itself_is_no_failure(study, tmp_path):
    """Such as one with `run.max_hours`, or one that a scheduler stopped: the others are made, and it is continued."""
    (tmp_path / "plain_seed_0").write_text("-75")
    code, _, err, calls = study()
    assert (code, made(calls)) == (75, ALL)
    assert "Stopped: with 1 run to go; continue with: repan" in err
    code, *_, calls = study()
    assert (code, made(calls)) == (0, [("train", True, "plain/seed_0")])


def test_records_without_a_state_are_no_run_to_begin_again(study, tmp_path):
    folder = tmp_path / "out" / "plain" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "best.pt").touch()
    (folder / "metrics.jsonl").write_text("{}\n")
    code, _, err, calls = study()
    assert (code, calls) == (2, [])
    assert "seed_0 holds records of epochs but no last.pt to continue from: bring that back, or move the folder" in err
    assert (folder / "best.pt").exists()


def test_it_stops_in_time_and_the_same_command_continues(study, tmp_path):
    code, _, err, calls = study("--minutes", "1e-9")
    assert (code, calls) == (75, [])
    assert "Stopped: with 4 runs to go; continue with: repan" in err
    (tmp_path / "restarts_seed_0").write_text("75")
    code, _, err, calls = study("--minutes", str(1 / 60))
    assert (code, made(calls)) == (75, ALL[:2])
    assert "restarts seed 0: stopped, can be continued" in err
    code, *_, calls = study()
    assert (code, made(calls)) == (0, [("cycle", True, "restarts/seed_0"), *ALL[2:]])


def test_the_folder_records_the_state_and_the_command_that_continues_it(study, tmp_path):
    """Also after a part of the study was made by another command."""

    def told(*words):
        study(*words)
        return studies.is_unfinished(tmp_path / "out"), studies.how_to_continue(tmp_path / "out")

    (tmp_path / "restarts_seed_0").write_text("75")
    assert told("--minutes", str(1 / 60)) == (True, f"repan study grid.yaml --out out --minutes {1 / 60}")
    (tmp_path / "out" / "restarts" / "seed_0" / "config.yaml").write_text("")
    assert told("--arms", "plain") == (True, f"repan study grid.yaml --out out --minutes {1 / 60}")
    assert told() == (False, "repan study grid.yaml --out out")
    assert studies.how_to_continue(tmp_path / "older") == f"repan study GRID --out {tmp_path}/older"


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself such a signal there")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_lets_the_runs_save(study, tmp_path, number, expected):
    (tmp_path / "plain_seed_0").write_text("75")

    def send():
        while not (tmp_path / "waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code, _, err, _ = study()
    sender.join()
    assert code == expected
    assert "plain seed 0: stopped, can be continued" in err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be bound to cores there")
def test_several_at_once_share_the_cores_and_the_devices(study, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, _, err, calls = study("--jobs", "2", "--device", "cuda:0,cuda:1")
    assert code == 0, err
    assert sorted(made(calls)) == sorted(ALL)
    assert {words[-1] for words, *_ in calls} == {"cuda:0", "cuda:1"}
    assert {int(threads) for _, threads, _ in calls} <= {max(cores // 2, 1), (cores + 1) // 2}


def test_a_run_killed_before_its_first_save_starts_over(study, tmp_path):
    folder = tmp_path / "out" / "plain" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    code, *_, calls = study()
    assert (code, made(calls)[0]) == (0, ("train", False, "plain/seed_0"))


def test_a_dry_run_starts_nothing(study, tmp_path):
    code, out, err, calls = study("--dry-run")
    assert (code, calls, (tmp_path / "out").exists()) == (0, [], False)
    assert "one cosine" in out
    assert "4 runs below out, seeds 0, 1" in err
    study("--seeds", "0")
    code, out, *_ = study("--dry-run", "--json")
    states = {line["run"]: line["state"] for line in json.loads(out)["runs"]}
    assert states["out/plain/seed_0"] == "done"
    assert states["out/plain/seed_1"] == "to do"


def test_the_folder_of_an_older_version_is_continued(study, tmp_path):
    """Its finished runs are kept and its stopped one goes on, whichever name the grid has for a setting."""
    older = GRID.replace("cycle: {count: 1}", "cycle: {count: 1, lr: restart}")
    newer = older.replace("lr: restart", "schedule: restart")
    (tmp_path / "grid.yaml").write_text(newer)
    assert study()[0] == 0
    arm = tmp_path / "out/restarts/arm.yaml"
    for number, grid in enumerate((older, newer)):
        assert "cycle.schedule: restart" in arm.read_text()
        arm.write_text(arm.read_text().replace("cycle.schedule", "cycle.lr"))
        (tmp_path / f"out/restarts/seed_{number}/status.json").write_text('{"state": "preempted"}')
        (tmp_path / "grid.yaml").write_text(grid)
        code, _, err, calls = study()
        assert (code, made(calls)) == (0, [("cycle", True, f"restarts/seed_{number}")]), err
        assert err.count("cycle.lr is now cycle.schedule") == (grid == older)
        assert "cycle.schedule: restart" in arm.read_text()
    code, _, err, calls = study("cycle.lr=continuous")
    assert (code, calls) == (2, [])
    assert "arm restarts: cycle.schedule is continuous, but its runs in out/restarts were made with restart" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "plane"], "no arm 'plane' in grid.yaml; did you mean plain?"),
        (["--seeds", "a"], "--seeds: expected numbers such as 0, 1, 2"),
        (["--seeds", "1,1"], "--seeds: a seed is given twice"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--data-root", "a", "data.root=b"], "--data-root and data.root= are the same setting: give one"),
        (["lr=1"], "arm plain: unknown setting 'lr'; did you mean optim.lr?"),
        (["run.seed=1"], "run.seed is set for each run of a study: give --seeds"),
        (["cycle.count=1", "--arms", "plain"], "cycle.count has no effect: none of the chosen arms reads it"),
    ],
)
def test_bad_words_are_reported(study, words, says):
    code, _, err, calls = study(*words)
    assert (code, calls) == (2, [])
    assert err.splitlines()[0] == f"Error: {says}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("arms:", "arm:", "unknown key 'arm'; did you mean arms?"),
        ("about: one cosine", "abut: one cosine", "arm plain: unknown key 'abut'; did you mean about?"),
        ("command: train", "command: tran", "arm plain: command: 'tran' is not one of cycle, train, distill"),
        ("command: train", "like: restart", "arm plain: like: no arm 'restart'; did you mean restarts?"),
        ("command: train", "like: plain", "arm plain: 'like' leads back to plain"),
        ("control: true", "control: 1", "arm plain: control: expected true or false"),
        ("  plain:", "  a/b:", "arm 'a/b': a name of letters, digits, '_', '-', '+' and '.' is needed"),
        ("seeds: [0, 1]", "seeds: 3", "seeds: expected numbers such as 0, 1, 2"),
        ("settings:\n", "settings: [1]\nx:\n", "unknown key 'x'; known are about, settings, arms, seeds"),
        ("arms:", "command: train\narms:", "unknown key 'command'; it belongs into an arm"),
        ("arms:", "cycle: {count: 1}\narms:", "unknown key 'cycle'; it belongs below 'settings:'"),
        ("about: one cosine", "optim.lr: 1", "arm plain: unknown key 'optim.lr'; it belongs below 'settings:'"),
    ],
)
def test_bad_grids_are_reported(study, tmp_path, old, new, says):
    assert old in GRID
    (tmp_path / "grid.yaml").write_text(GRID.replace(old, new, 1))
    code, _, err, calls = study()
    assert (code, calls) == (2, [])
    assert err.splitlines() == [f"Error: grid.yaml: {says}"]


# ---------------------------------------------------------------------------------------------- the grids that ship

ARMS = [(name, arm) for name, path in grids().items() for arm in read_grid(path).arms.values()]


def test_the_grids_that_ship():
    counts = {name: len(read_grid(path).arms) for name, path in grids().items()}
    assert counts == {"full": 8, "quick": 4, "small": 20, "whole": 7}


@pytest.mark.parametrize(("grid", "arm"), ARMS, ids=[f"{grid}-{arm.name}" for grid, arm in ARMS])
def test_the_arms_differ_only_in_their_subject(grid, arm):
    """All epochs together are those of the control, data and optimizer too, but for the learning rate of each cycle."""
    shared = read_grid(grids()[grid]).arms["one_cosine"].resolve({}).config
    settings = arm.resolve({}).config
    plan = cycle_plan(settings, baseline=True) if arm.command == "cycle" else training_plan(settings)
    assert sum(phase.epochs for phase in plan) == shared.epochs == {"full": 610, "quick": 20}.get(grid, 60)
    assert (settings.model, settings.data, settings.ema) == (shared.model, shared.data, shared.ema)
    assert plan[0].optim == shared.optim
    for phase in plan[1:]:
        assert phase.optim.lr == (0.05 if settings.cycle.schedule == "restart" else 0.1)
        assert phase.start_from == "last"
    family = arm.name.partition("_")[0]
    assert arm.command == ("train" if family == "one" else "cycle")
    if family != "one":
        assert settings.cycle.schedule == family
        assert (settings.cycle.restart == "none") == arm.name.endswith("_none")


@pytest.mark.parametrize("grid", list(grids()))
def test_no_two_arms_are_the_same(grid):
    arms = read_grid(grids()[grid]).arms.values()
    assert len({json.dumps(config.flatten(arm.resolve({}).config)) for arm in arms}) == len(arms)
    assert all(arm.about for arm in arms)


# ---------------------------------------------------------------------------------------------- with repan itself

REAL = [
    "data.name=digits",
    "model.name=repvgg_a0_cifar",
    "data.classes=10",
    "data.per_class=60",
    "data.image_size=null",
]
REAL += ["data.batch_size=64", "run.precision=fp32"]


@pytest.mark.soak
def test_real_runs_are_stopped_continued_compared_and_kept_as_records(tmp_path, capsys):
    """Two arms on a few digits; SIGTERM in the second of them."""
    words = ["study", "small", "--out", tmp_path / "out", "--arms", "continuous_zero,one_cosine", "--seeds", "0"]
    words += [*REAL, "epochs=3", "baseline.epochs=2", "cycle.count=1"]
    process = start(*words, cwd=ROOT)
    metrics = tmp_path / "out" / "continuous_zero" / "seed_0" / "metrics.jsonl"
    until = time.monotonic() + 180
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "continuous_zero seed 0: stopped, can be continued" in err
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert "continuous_zero seed 0: continues" in err
    table = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in table[2:4]] == ["| one_cosine", "| continuous_zero"]
    assert " | control | 3 | " in table[2]
    kept = tmp_path / "kept"
    assert run(capsys, "compare", tmp_path / "out", "--by-folder", "--records", kept)[0] == 0
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.json")) == [
        "continuous_zero/0.json",
        "one_cosine/0.json",
    ]
