"""What people see: numbers as people say them, plain lines without a terminal, brackets that are no markup."""

import io

import pytest
from rich.console import Console

from repan_cli import console, engine


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_sparkline():
    assert console.sparkline([0, 50, None, 100]) == "▁▅█"
    assert console.sparkline([3, 3]) == "▁▁"
    assert console.sparkline([None]) == ""


def display(tmp_path, **options):
    shown = console.Display(epochs={0: 2, 1: 3}, steps=4, log=tmp_path / "log.txt")
    shown.console = Console(file=io.StringIO(), width=80, **options)
    shown.progress = shown._progress() if options.get("force_terminal") else None
    return shown


def step(**changes):
    values = {"cycle": 1, "epoch": 2, "step": 3, "loss": 1.5, "lr": 0.1, "attach_rate": 0.5, "images_per_second": 1e3}
    return engine.Step(**{**values, **changes})


def epoch(**changes):
    values = {
        "cycle": 1,
        "epoch": 2,
        "loss": 1.5,
        "first_loss": 2.0,
        "train_top1": 50.0,
        "val_top1": 60.0,
        "val_loss": 1.0,
    }
    rest = {"lr": 0.1, "attach_rate": 0.5, "images_per_second": 12345.0, "best": True}
    return engine.Epoch(**{**values, **rest, **changes})


def test_lines_fit_80_columns(tmp_path):
    shown = display(tmp_path)
    shown.show(engine.CycleStart(1, True, 22, 0, 60.0, 60.0, 0.5, 0.51, 3e-7))
    shown.show(epoch())
    shown.show(epoch(val_top1=None, best=False))
    shown.show(engine.CycleEnd(1, 61.0, 62.0, 90.0, 1.0, 70.0))
    lines = shown.console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines), lines
    assert "merged and regrew 22 blocks" in lines[0]
    assert lines[1] == "training loss 0.500 -> 0.510, val 60.00 -> 60.00"
    assert "60.00*" in lines[3]
    assert "cycle 1/1: val 61.00, test 62.00, 1 min 10 s" in lines[5]
    assert (tmp_path / "log.txt").read_text().splitlines() == lines


def test_without_a_terminal_a_long_epoch_still_speaks(tmp_path):
    shown = display(tmp_path)
    shown.show(step())
    assert shown.console.file.getvalue() == ""
    shown.spoke -= 2 * console.SECONDS_BETWEEN_LINES
    shown.show(step())
    assert "cycle 1/1, epoch 2/3, step 3/4" in shown.console.file.getvalue()
    assert console.SECONDS_BETWEEN_LINES <= 60


def test_on_a_terminal_the_live_display_follows_the_run(tmp_path):
    shown = display(tmp_path, force_terminal=True)
    with shown:
        shown.show(step())
        epoch_task, run_task = shown.progress.tasks
        assert (epoch_task.completed, epoch_task.total) == (3, 4)
        assert (run_task.completed, run_task.total) == (2 * 4 + 4 + 3, 5 * 4)


def test_zero_gammas_are_said(tmp_path):
    shown = display(tmp_path)
    shown.show(engine.CycleStart(1, True, 22, 3, None, None, 0.5, 0.51, 3e-7))
    assert "3 channels had gamma 0" in shown.console.file.getvalue()


@pytest.mark.parametrize(("after", "warned"), [(0.9, False), (1.1, True)])
def test_a_restart_that_breaks_train_mode_is_said(tmp_path, after, warned):
    shown = display(tmp_path)
    shown.show(engine.CycleStart(1, True, 22, 0, None, None, 0.5, after, 3e-7))
    assert ("Warning: the restart kept the function of eval mode only" in shown.console.file.getvalue()) == warned


def test_counts():
    assert [console.count(number, "epoch") for number in (0, 1, 1200)] == ["0 epochs", "1 epoch", "1,200 epochs"]


def test_brackets_are_not_markup(tmp_path):
    shown = display(tmp_path)
    shown.say("runs/[bold]x")
    assert "runs/[bold]x" in shown.console.file.getvalue()
