"""Screen output: readable numbers, plain lines without a terminal, brackets that are not read as markup."""

import io
import math

import pytest
from rich.console import Console

from repan_cli.display import console, live, tables
from repan_cli.runs import directory
from repan_cli.system.text import SPARKLINE_WIDTH, count, duration, loss_text, sparkline, wrapped
from repan_cli.training.events import CycleEnd, CycleStart, Epoch, LossLog, StepEnd


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sparkline():
    assert sparkline([0, 50, None, 100]) == "▁▅█"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([None]) == ""
    many = sparkline(range(640))
    assert (len(many), many[0], many[-1]) == (SPARKLINE_WIDTH, "▁", "█")


def display(tmp_path, *, width=80, compiles=False, **options):
    shown = console.Display(epochs={0: 2, 1: 3}, steps=4, log=tmp_path / "log.txt", compiles=compiles)
    shown.console = Console(file=io.StringIO(), width=width, _environ={"TERM": "xterm"}, **options)
    shown.live = shown._live()
    return shown


def step(**changes):
    values = {"cycle": 1, "epoch": 2, "step": 3, "loss": 1.5, "lr": 0.1, "attach_rate": 0.5, "images_per_second": 1e3}
    return LossLog(**{**values, **changes})


def epoch(**changes):
    values = {
        "cycle": 1,
        "epoch": 2,
        "loss": 1.5,
        "first_loss": 0.9,
        "train_top1": 50.0,
        "val_top1": 60.0,
        "val_loss": 1.0,
    }
    rest = {"lr": 0.1, "attach_rate": 0.5, "images_per_second": 12345.0, "best": True, "steps": 10}
    rest |= dict.fromkeys(("loss_head_50", "loss_head_200", "loss_tail_200"))
    return Epoch(**{**values, **rest, **changes})


def test_lines_fit_80_columns(tmp_path):
    shown = display(tmp_path)
    shown.show(CycleStart(1, True, 22, 0, 60.0, 60.0, 0.5, 0.51, 3e-7))
    shown.show(epoch())
    shown.show(epoch(val_top1=None, best=False))
    shown.show(CycleEnd(1, 61.0, 62.0, 90.0, 1.0, 70.0))
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
    shown.speak()
    assert shown.console.file.getvalue() == ""
    shown.spoke -= 2 * console.SECONDS_BETWEEN_LINES
    shown.speak()
    assert "cycle 1/1, epoch 2/3, step 3/4  loss 1.500  lr 0.1000  attach 0.50" in shown.console.file.getvalue()
    shown.show(step(step=4))
    shown.spoke -= 2 * console.SECONDS_BETWEEN_LINES
    shown.speak()
    assert "cycle 1/1, epoch 2/3, scoring  loss" in shown.console.file.getvalue()
    assert console.SECONDS_BETWEEN_LINES + shown.pulse.seconds <= 60


def test_it_speaks_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.01)
    shown = display(tmp_path)
    shown.pulse = directory.Heartbeat(shown.speak, seconds=0.01)
    with shown:
        shown.pulse.stopped.wait(0.2)
    assert "epoch 1/2, starting" in shown.console.file.getvalue()


def screen(shown):
    """What the live display draws."""
    drawn = Console(file=io.StringIO(), width=shown.console.width)
    drawn.print(shown.view)
    return drawn.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "rows"), [(60, 3), (80, 3), (129, 3), (130, 2), (160, 2)])
def test_the_live_display_keeps_to_its_lines(tmp_path, width, rows):
    shown = display(tmp_path, width=width, force_terminal=True)
    epochs = dict.fromkeys(range(16), 160)
    shown.epochs = shown.position.epochs = epochs
    shown.position.steps = 40036
    shown.show(epoch(cycle=15, epoch=159, val_top1=100.0))
    shown.show(step(cycle=15, epoch=160, step=1, loss=12345.678, images_per_second=123456))
    shown.show(step(cycle=15, epoch=160, step=40036, loss=12345.678, images_per_second=123456))
    lines = screen(shown)
    assert len(lines) == rows
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        for text in (
            "cycle 15/15",
            "epoch 160/160",
            "scoring",
            "left",
            "100 %",
            "val 100.00, best 100.00*",
            "attach 0.50",
        ):
            assert any(text in line for line in lines), (text, lines)


def test_on_a_terminal_the_live_display_follows_the_run(tmp_path):
    shown = display(tmp_path, width=140, force_terminal=True)
    with shown:
        assert "starting" in screen(shown)[0]
        shown.show(CycleStart(1, True, 22, 0, 60.0, 60.0, 0.5, 0.51, 3e-7))
        shown.show(step(epoch=1, step=1))
        shown.show(StepEnd(1, 1, 2))
        first, second = screen(shown)
        assert first.startswith("cycle 1/1    epoch 1/3")
        assert "2/4" in first
        assert "val" not in first
        assert second.startswith("whole run    epoch 3/5")
        assert "50 %" in second
        shown.show(epoch(epoch=1, val_top1=60.0))
        shown.show(epoch(epoch=2, val_top1=50.0, best=False))
        shown.show(step(epoch=3, step=1))
        assert "val 50.00, best 60.00*" in screen(shown)[0]
        shown.show(CycleEnd(0, 61.0, 62.0, 90.0, 1.0, 70.0))
        assert "restart" in screen(shown)[0]


def test_compiling_is_shown_while_it_lasts(tmp_path):
    shown = display(tmp_path, compiles=True)
    shown.show(CycleStart(0))
    assert "compiling the training pass (run.compile=on)" in shown.console.file.getvalue()
    assert "compiling" in screen(shown)[0]
    shown.show(StepEnd(0, 1, 1))
    shown.show(CycleStart(1))
    assert shown.console.file.getvalue().count("compiling") == 1
    assert "compiled, 0.0 s with the first step" in shown.console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(None, "-:--"), (7.4, "0:07"), (760, "12:40"), (11100, "3:05:00")])
def test_time_left(seconds, text):
    assert live.clock(seconds) == text


def test_the_remaining_time_follows_from_the_pace():
    here = live.Position(epochs={0: 2, 1: 3}, steps=10)
    assert here.left(0.0) == (None, None)
    for number in range(1, 6):
        here.move(StepEnd(0, 1, number), now=100.0 + number)
    assert here.left(105.0) == (5.0, 5.0 + 4 * 10.0)
    assert here.left(107.0) == (3.0, 3.0 + 4 * 10.0)
    for number in range(1, 4):  # scoring took 10 seconds beside
        here.move(StepEnd(0, 2, number), now=120.0 + number)
    assert here.left(123.0) == (7.0, 7.0 + 3 * 20.0)
    for number in (4, 5):  # a resumed run begins amid an epoch
        here.move(StepEnd(1, 3, number), now=200.0 + 3 * number)
    assert here.left(215.0) == (15.0, 15.0)


def luminance(color):
    """Relative, as in the rules of contrast of WCAG 2."""
    parts = (part / 255 for part in color)
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("style", [live.BAR, live.BACK, console.WARNING])
def test_colours_can_be_seen_on_white_and_on_black(style):
    xterm = {"magenta": (205, 0, 205), "bright_black": (127, 127, 127)}
    seen = luminance(xterm[style.removeprefix("bold ")])
    assert 1.05 / (seen + 0.05) >= 3
    assert (seen + 0.05) / 0.05 >= 3


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    shown = display(tmp_path)
    shown.console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert shown._live() is None


def test_zero_gammas_are_reported(tmp_path):
    shown = display(tmp_path)
    shown.show(CycleStart(1, True, 22, 3, None, None, 0.5, 0.51, 3e-7))
    assert "3 channels had gamma 0" in shown.console.file.getvalue()


@pytest.mark.parametrize(("blocks", "told"), [(1, "1 block;"), (22, "22 blocks;")])
def test_the_blocks_of_a_restart_are_counted(tmp_path, blocks, told):
    shown = display(tmp_path)
    shown.show(CycleStart(1, True, blocks, 0, None, None, 0.5, 0.51, 3e-7))
    assert f"merged and regrew {told} logits moved" in shown.console.file.getvalue()


@pytest.mark.parametrize(
    ("steps", "titles", "words"),
    [(10, ["all", "val after loss 20 val"], 10), (150, ["first first", "val after loss 50 200 val"], 11)],
)
def test_the_table_of_phases_names_the_steps_of_its_losses_and_fits_80_columns(tmp_path, steps, titles, words):
    shown = display(tmp_path)
    figures = {"top1": 100.0, "test_top1": 100.0, "seconds": 59.0}
    losses = {"before_200": 123.456, "first_50": 1234567.0, "first_200": 123.456}
    row = {"cycle": 1, "top1_before": 100.0, "top1_after_restart": 100.0, "felt": losses, **figures}
    shown.table({"baseline": figures, "cycles": [row]}, [{"cycle": 1, "steps": steps}] * 2)
    lines = shown.console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert [" ".join(line.split()) for line in lines[1:3]] == titles
    assert len(lines[-1].split()) == words, "windows of the same steps have one column"


@pytest.mark.parametrize(("after", "warned"), [(0.9, False), (1.1, True)])
def test_a_restart_that_breaks_train_mode_is_reported(tmp_path, after, warned):
    shown = display(tmp_path)
    shown.show(CycleStart(1, True, 22, 0, None, None, 0.5, after, 3e-7))
    assert ("Warning: the restart kept the function in eval mode only" in shown.console.file.getvalue()) == warned


@pytest.mark.parametrize(("restarted", "first", "warned"), [(True, 1.1, False), (True, 1.3, True), (False, 1.3, False)])
def test_a_loss_that_rises_after_a_restart_is_reported_once(tmp_path, restarted, first, warned):
    shown = display(tmp_path)
    shown.show(epoch(cycle=0, loss=0.7))
    shown.show(CycleStart(1, restarted, 22, 0, None, None, 0.2, 0.2, 3e-7))
    for number in (1, 2):
        shown.show(epoch(epoch=number, first_loss=first))
    assert shown.console.file.getvalue().count("the training loss rose from 0.700 to 1.300") == warned


def test_counts():
    assert [count(number, "epoch") for number in (0, 1, 1200)] == ["0 epochs", "1 epoch", "1,200 epochs"]


def test_brackets_are_not_markup(tmp_path):
    shown = display(tmp_path)
    shown.say("runs/[bold]x")
    assert "runs/[bold]x" in shown.console.file.getvalue()


def test_a_warning_amid_a_run_goes_through_the_console_of_the_live_display(tmp_path):
    shown = console.Display(epochs={0: 1}, steps=1)
    assert shown.console is console.on_stderr()


def test_sentences_break_between_words_and_commands_stay_whole():
    said = "the restart kept the function in eval mode only: the BN statistics had not settled"
    assert wrapped(said, 40).split("\n") == [
        "the restart kept the function in eval",
        "mode only: the BN statistics had not",
        "settled",
    ]
    assert wrapped(said, 40, before=9).split("\n")[0] == "the restart kept the function"
    assert wrapped("short", 40, before=9) == "short"
    path = "no folder " + "a/" * 60
    assert wrapped(path, 40) == "no folder\n" + "a/" * 60, "a path is copied, too"
    for command in ("continue with: repan cycle --resume runs/cycle/a", "python3 -m pip install something of a name"):
        assert wrapped(command, 20) == command
    assert wrapped("", 40, before=9) == ""


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (0.6931, "0.693"),
        (999.9, "999.900"),
        (1086.52, "1087"),
        (1.09e7, "1.1e+07"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_losses_fit_their_column(loss, text):
    assert loss_text(loss) == text
    assert len(text) <= 7


TITLES = ["arm", "test top-1", "over the control", "time"]
FIGURES = ["zero", "14.48 ± 0.39", "-4.60 [-13.44, +4.25]", "1 h 05 min"]


@pytest.mark.parametrize("width", range(20, 100, 7))
def test_no_table_breaks_a_figure(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    tables.print_table(TITLES, [FIGURES])
    out = capsys.readouterr().out
    assert set(" ".join([*TITLES, *FIGURES]).split()) <= set(out.split())
    assert all(len(line) <= width for line in out.splitlines()) or width < 30


def test_a_table_that_is_too_wide_is_a_list(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "26")
    tables.print_table(TITLES, [FIGURES])
    assert capsys.readouterr().out == (
        "arm zero\n  test top-1        14.48 ± 0.39\n  over the control  -4.60 [-13.44,\n"
        "                    +4.25]\n  time              1 h 05 min\n"
    )
    tables.print_table(
        ["preset", "what it does"], [("reference/a_long_name", "one two three four five six seven eight")]
    )
    assert capsys.readouterr().out == (
        "preset, what it does\nreference/a_long_name\n  one two three four five\n  six seven eight\n"
    )


def test_the_phases_of_a_run_are_a_list_on_a_narrow_terminal(tmp_path):
    row = {"cycle": 1, "top1_before": 50.0, "top1_after_restart": 50.0, "top1": 61.0, "test_top1": 62.0, "seconds": 3.0}
    baseline = {"top1": 50.0, "test_top1": 51.0, "seconds": 2.0}
    said = {}
    for width in (40, 100):
        shown = display(tmp_path, width=width)
        shown.table({"baseline": baseline, "cycles": [row]})
        said[width] = shown.console.file.getvalue()
    assert "phase cycle 1/1\n  val before       50.00\n" in said[40]
    assert max(map(len, said[40].splitlines())) <= 40
    for text in said.values():
        assert {"50.00", "51.00", "61.00", "62.00", "3.0"} <= set(text.split())
