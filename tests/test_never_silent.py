"""Long work shows its progress, unusual settings cause warnings, and signals are answered at once."""

import contextlib
import io
import signal
import threading
import time

import pytest
from rich.console import Console
from support import run, write_run

from repan_cli import config
from repan_cli.commands.early import fuse_targets
from repan_cli.commands.options import FuseOptions
from repan_cli.config.advice import how_to_restart_smoothly, unusual, why_loss_jumped, without_effect
from repan_cli.display.activity import Activity
from repan_cli.errors import InputError
from repan_cli.session import pace
from repan_cli.system import notices
from repan_cli.system.signals import StopSignals
from repan_cli.system.weight_files import file_in
from repan_cli.training.events import CycleEnd, Epoch, LossLog, StepEnd

DIGITS = {"model.name": "repvgg", "data.name": "digits"}


def advice(command="cycle", **given):
    given = {key.replace("__", "."): value for key, value in given.items()}
    found = config.resolve(command, None, {**DIGITS, **given}).config
    return [*unusual(found), *without_effect(found, given, cycles=command == "cycle")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim__name": "adamw", "baseline__optim__lr": "0.1"}, "lr=0.1 is far above the usual rate for adamw"),
        ({"cycle__attach_epochs": "2"}, "cycle.attach_epochs has no effect with cycle.attach=zero-gamma, which has no"),
        ({"teacher__alpha": "0.9"}, "teacher.alpha has no effect without a teacher"),
        ({"ema__decay": "0.9"}, "ema.decay has no effect while ema.enabled is false"),
        ({"cycle__restart": "none", "cycle__rule": "running"}, "cycle.rule has no effect with cycle.restart=none"),
        ({"cycle__restart": "rescale", "cycle__rule": "reset"}, "cycle.rule has no effect with cycle.restart=rescale"),
        ({"cycle__rule": "reset", "cycle__trunk_scale": "keep"}, "cycle.trunk_scale has no effect with cycle.rule"),
        ({"cycle__restart": "rescale", "cycle__momentum": "carry"}, "cycle.momentum has no effect with cycle.restart="),
        ({"cycle__rule": "reset", "cycle__calibration_images": "9"}, "cycle.calibration_images has no effect with"),
        (
            {"optim__name": "lion", "optim__lr": "0.001", "baseline__optim__lr": "0.001", "optim__momentum": "0.5"},
            "optim.momentum has no effect on optim.name=lion",
        ),
    ],
)
def test_what_few_want_is_reported(given, said):
    assert any(said in line for line in advice(**given)), advice(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optim__name": "adamw", "optim__lr": "0.001", "baseline__optim__lr": "0.001"},
        {"cycle__attach": "ramp", "cycle__attach_epochs": "2"},
        {"cycle__freeze_trunk": "true", "cycle__attach_epochs": "2"},
        {"teacher__name": "previous", "teacher__alpha": "0.9"},
        {"ema__enabled": "true", "ema__decay": "0.9"},
        {"cycle__rule": "running"},
        {"cycle__restart": "none", "cycle__schedule": "continuous", "cycle__reseed": "same"},
        {"cycle__restart": "none", "cycle__momentum": "carry"},
        {"cycle__restart": "rescale", "cycle__momentum": "zero"},
    ],
)
def test_settings_with_an_effect_are_not_reported(given):
    assert not advice(**given)


def test_settings_of_a_users_file_are_checked_but_defaults_are_not(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: recipes/digits\nema:\n  decay: 0.5\ncycle:\n  attach_epochs: 5.0\n")
    found = config.resolve("cycle", str(mine), DIGITS)
    assert found.own["ema.decay"] == "0.5"
    assert "cycle.attach_epochs" not in found.own
    assert not config.resolve("cycle", "recipes/digits", DIGITS).own


def test_warnings_come_before_a_run_begins(capsys):
    words = ("train", "--model", "repvgg_a0_cifar", "--dataset", "digits", "ema.decay=0.5", "run.device=cuda:99")
    _, _, err = run(capsys, *words)
    assert "Warning: ema.decay has no effect while ema.enabled is false" in err


def test_groups_of_unequal_length_are_reported(tmp_path, capsys):
    write_run(tmp_path / "long", cycle__count="1")
    write_run(tmp_path / "short", val=(50.0, 60.0, 70.0, 69.0, 68.0, 67.0), cycle__rule="reset")
    _, _, err = run(capsys, "compare", tmp_path)
    assert "differ in length (4 and 6 epochs)" in " ".join(err.split())


def test_a_run_that_stopped_in_its_first_epoch_has_lost_nothing(tmp_path, caplog):
    (tmp_path / "last.pt").write_bytes(b"x")
    (tmp_path / "metrics.jsonl").write_text("")
    assert fuse_targets(FuseOptions(checkpoint=str(tmp_path)))[0].path == tmp_path / "last_fused.pt"
    assert "has no best.pt yet, because no epoch has ended: using last.pt" in caplog.text
    assert "lost" not in caplog.text
    (tmp_path / "best.pt").write_bytes(b"x")
    assert fuse_targets(FuseOptions(checkpoint=str(tmp_path)))[0].path == tmp_path / "best_fused.pt"


def test_a_run_that_lost_its_best_weights_says_so(tmp_path, caplog):
    (tmp_path / "last.pt").write_bytes(b"x")
    (tmp_path / "metrics.jsonl").write_text('{"cycle": 0, "val_top1": 50.0}\n')
    assert file_in(tmp_path).name == "last.pt"
    assert "has lost its best.pt: using last.pt" in caplog.text
    caplog.clear()
    (tmp_path / "metrics.jsonl").write_text('{"cycle": 0, "val_top1": null}\n')
    assert file_in(tmp_path).name == "last.pt"
    assert not caplog.text


def test_a_folder_of_runs_is_answered_with_one_of_them(tmp_path):
    for name in ("control_seed_0", "seed_0"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        (tmp_path / "demo" / name / "best.pt").write_bytes(b"x")
    for folder in (tmp_path / "demo", tmp_path):
        with pytest.raises(InputError, match=r"the runs are in it, such as [^']*/seed_0$"):
            file_in(folder)


# ---------------------------------------------------------------------------------------------- what takes long


def said_by(console):
    return console.file.getvalue()


def test_a_file_gets_a_line_when_something_takes_long(monkeypatch):
    monkeypatch.setattr("repan_cli.display.activity.PATIENCE", 0.05)
    console = Console(file=io.StringIO())
    with notices.watched_by(Activity(console)):
        with notices.doing("reading the data"):
            pass
        assert not said_by(console)
        with notices.doing("building the network"):
            time.sleep(0.3)
    assert said_by(console).startswith("building the network ... ")
    assert said_by(console).count("\n") == 1


def test_a_terminal_shows_the_current_work_and_erases_it(monkeypatch):
    monkeypatch.setattr("repan_cli.display.activity.AT_ONCE", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with notices.watched_by(Activity(console)), notices.doing("proving the merged network"):
        time.sleep(0.3)
    assert "proving the merged network ... 0." in said_by(console)
    assert "\x1b[2K" in said_by(console).rpartition("proving")[2]  # the line is gone again


def test_the_innermost_activity_is_shown_and_the_last_watcher_told():
    first, second = [], []
    in_place = (notices.watched_by(first.append), notices.doing("outer"), notices.doing("inner"))
    with contextlib.ExitStack() as entered:
        for each in (*in_place, notices.watched_by(second.append), notices.doing("innermost")):
            entered.enter_context(each)
    assert not notices._DOING
    assert first[:3] == ["outer", "inner", None]
    assert second[0] == "innermost"
    assert first[-1] is None


def test_a_signal_is_answered_at_once_in_a_thread_of_its_own():
    heard = []

    def hear(number):
        heard.append((number, threading.current_thread() is threading.main_thread()))

    with StopSignals(hear) as signals:
        for _ in range(2):  # as Python calls it: the workers of pytest-xdist take no signals
            signals._take(signal.SIGTERM, None)
        for _ in range(100):
            if heard:
                break
            time.sleep(0.01)
    assert heard == [(signal.SIGTERM, False)]
    assert signals.received == signal.SIGTERM


# ---------------------------------------------------------------------------------------------- pace


class Clock:
    def __init__(self):
        self.moment = 0.0

    def __call__(self):
        return self.moment


def epoch(watch, clock, seconds_a_step, steps=20):
    for step in range(1, steps + 1):
        clock.moment += seconds_a_step
        watch.take(StepEnd(0, 1, step))
        if step % 5 == 0:
            watch.take(LossLog(0, 1, step, 1.0, 0.1, 1.0, 10.0))
    clock.moment += 1000  # scoring
    watch.take(Epoch(0, 1, 1, 1, 1, 1, 1, 0.1, 1, 1, False, steps, None, None, None))


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(pace.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(pace.os, "getloadavg", lambda: (7.5, 0, 0), raising=False)
    clock = Clock()
    return pace.PaceWatch(32, threads=2, now=clock), clock


def test_a_slowdown_is_reported_once_until_it_recovers(watch, caplog):
    watch, clock = watch
    for _ in range(3):
        epoch(watch, clock, 1.0)
    assert not caplog.text
    for _ in range(4):
        epoch(watch, clock, 10.0)
    assert caplog.text.count("images/s from 32: other processes use the cores (load 7.5, 2 cores)") == 1
    assert "run.threads=1 on --resume" in caplog.text
    for _ in range(3):
        epoch(watch, clock, 1.0)
    epoch(watch, clock, 10.0)
    assert caplog.text.count("images/s from 32") == 2


@pytest.mark.parametrize(
    ("device", "usable", "why"),
    [
        ("cpu", 2, "the machine is slower or waits for its disk"),
        ("cpu", 1, "the machine is slower, is held to its limit of 1 core, or waits for its disk"),
        ("cuda", 2, "other processes use the GPU, or the machine is slower or waits for its disk"),
    ],
)
def test_a_slowdown_on_free_cores_has_another_reason(watch, caplog, monkeypatch, device, usable, why):
    watch, clock = watch
    watch.device = device
    monkeypatch.setattr(pace.os, "getloadavg", lambda: (1.5, 0, 0), raising=False)
    monkeypatch.setattr(pace, "usable_cores", lambda: usable)
    for seconds in (1.0, 10.0, 10.0):
        epoch(watch, clock, seconds)
    assert caplog.text.rstrip().endswith(why)


def test_short_or_small_slowdowns_are_not_reported(watch, caplog):
    watch, clock = watch
    epoch(watch, clock, 1.0)
    epoch(watch, clock, 3.0)
    epoch(watch, clock, 80.0, steps=2)
    watch.take(CycleEnd(0, 1, 1, 1, 1, 1))
    epoch(watch, clock, 1.0)
    assert not caplog.text


@pytest.mark.parametrize(
    ("given", "images", "said", "unsaid"),
    [
        ({}, 50_000, "had not settled: train longer before it", "cycle."),
        ({}, 19, "19 training images in batches of 128 are few: set a smaller --batch-size", "cycle."),
        ({}, 19, "size. The statistics were measured on 19 images: more training images help. Or train", "cycle."),
        ({"cycle.calibration_images": "20"}, 50_000, "on 20 images: raise cycle.calibration_images", "batch-size"),
        ({"data.batch_size": "2", "cycle.rule": "calibrate"}, 190, "on 190 images", "batch-size"),
        ({"cycle.rule": "running"}, 19, "cycle.rule=running changed the function in train mode", "settled"),
        ({"cycle.attach": "one", "cycle.rule": "reset"}, 9, "cycle.rule=reset and cycle.attach=one changed", "settled"),
    ],
)
def test_a_loss_that_jumped_is_explained_by_the_settings_of_the_run(given, images, said, unsaid):
    found = config.resolve("cycle", None, {**DIGITS, "data.batch_size": "128", **given}).config
    text = why_loss_jumped(found, images)
    assert said in text
    assert unsaid not in text.replace("raise cycle.", "raise ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a lower learning rate keeps it lower"),
        ({"cycle.trunk_scale": "keep"}, "with cycle.trunk_scale=pace or a lower learning rate it rises less"),
        (
            {"cycle.schedule": "restart", "cycle.rule": "running", "cycle.trunk_scale": "merged"},
            "with cycle.schedule=continuous, cycle.rule=calibrate, cycle.trunk_scale=pace or a lower",
        ),
        ({"cycle.momentum": "zero"}, "with cycle.momentum=carry or a lower"),
    ],
)
def test_a_loss_that_rose_after_a_restart_is_answered_by_settings_that_the_run_does_not_have(given, said):
    found = config.resolve("cycle", None, {**DIGITS, "data.batch_size": "128", **given}).config
    assert how_to_restart_smoothly(found).startswith(said)
