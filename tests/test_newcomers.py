"""Mistakes of new users: words of other programs, misspelled names, full streams, labels that are too long."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support import ROOT, one_line, plan, run, write_folders, write_run

from repan_cli import config, door
from repan_cli.compare import results, table
from repan_cli.compare.groups import compare
from repan_cli.data import datasets
from repan_cli.display.console import Display
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.models import own_block
from repan_cli.session import build, summary, teachers
from repan_cli.system import notices
from repan_cli.system.text import file_size, short
from repan_cli.training.events import CycleStart, Epoch
from repan_cli.training.plan import training_plan


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(("cycle.cycles", "cycle.count"), ("cycles", "cycle.count"), ("cycle.epochs", "epochs")),
        *(("learning_rate", "optim.lr"), ("optim.optimizer", "optim.name"), ("img_size", "data.image_size")),
        *(("batch_size", "data.batch_size"), ("train.batch_size", "data.batch_size"), ("dataset", "data.name")),
    ],
)
def test_the_words_of_others_are_answered_with_ours(key, meant):
    with pytest.raises(InputError, match=f"unknown setting '{key}'; did you mean {meant}"):
        config.typed({key: "1"})


def test_every_word_of_others_means_a_setting():
    from repan_cli.config.resolve import OTHER_WORDS

    assert set(OTHER_WORDS.values()) <= config.SCHEMA.keys()
    assert not set(OTHER_WORDS) & {key.rpartition(".")[2] for key in config.SCHEMA}


@pytest.mark.parametrize(("name", "meant"), [("cifar", "recipes/cifar"), ("digits.yaml", "recipes/digits")])
def test_a_preset_without_its_folder_is_answered(name, meant):
    with pytest.raises(InputError, match=f"no configuration file or preset '{name}'; did you mean .*{meant}"):
        config.find_preset(name)


@pytest.mark.parametrize("words", ["list blocks", "--version", "--help"])
def test_a_full_stdout_is_one_line(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "repan_cli", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert (done.returncode, done.stderr) == (4, "Error: cannot write to stdout: No space left on device\n")


@pytest.mark.slow
def test_closed_streams_are_one_line_or_none():
    repan = f"{sys.executable} -m repan_cli"
    commands = {"list blocks >&-": 4, "info gone.pt 2>&-": 2, "info gone.pt >&- 2>&-": 2}
    for words, code in commands.items():
        done = subprocess.run(f"{repan} {words}", shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == code, words
        assert done.stderr == ("" if "2>&-" in words else "Error: cannot write to stdout: it is closed\n")


def test_a_teacher_of_ones_own_names_the_setting_of_teachers(digits, tmp_path, monkeypatch):
    card = type("Card", (), {"model": "net.py:build"})
    saved = type("Saved", (), {"card": card})
    with pytest.raises(
        InputError, match="the teacher t.pt holds a network of your own, net.py:build: give teacher.mod"
    ):
        teachers._ours("t.pt", config.TeacherConfig(name="t.pt"), digits, saved)


@pytest.mark.parametrize(("readable", "others"), [("ac", "2 images are"), ("a", "1 image is")])
def test_the_broken_files_of_a_folder_are_named_at_the_end(tmp_path, few_blocks, small_run, capsys, readable, others):
    for name in (f"{letter}.png" for letter in readable):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no image")
    code, out, err = run(capsys, "predict", small_run.folder / "fused.pt", tmp_path, "--top", "1")
    assert code == 2
    assert out.count(".png") == len(readable)
    last = err.splitlines()[-1]
    assert last == (
        f"Error: 1 of {len(readable) + 1} images could not be read: {tmp_path}/b.png; the other {others} classified"
    )
    assert f"Warning: cannot read the image {tmp_path}/b.png" in err


def test_an_arm_removed_from_the_grid_is_reported(tmp_path, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("settings:\n  model: {name: repvgg}\n  data: {name: digits}\narms:\n  one: {command: train}\n")
    (tmp_path / "out" / "two").mkdir(parents=True)
    (tmp_path / "out" / "two" / "arm.yaml").write_text("epochs: 3\n")
    _, _, err = run(capsys, "study", grid, "--out", tmp_path / "out", "--dry-run")
    assert f"holds runs of two, which are no longer arms of {grid}" in " ".join(err.split())


def test_long_labels_name_only_what_tells_groups_apart(tmp_path, capsys):
    many = {"cycle__attach": "ramp", "cycle__branch_init": "small", "optim__weight_decay": "0.001", "optim__clip": "5"}
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **many)
    _, out, err = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert "optim.weight_decay=0.001\n" in out
    assert "branch_init" not in out
    said = " ".join(err.split())
    assert "labels show only the settings that distinguish the groups; they also differ in cycle.attach, " in said
    assert "cycle.attach, cycle.branch_init, optim.clip" in said


def epoch(rate=1.0):
    return Epoch(1, 2, 1.0, 1.0, 50.0, 50.0, 1.0, 0.1, rate, 100.0, True, 9, None, None, None)


def shown(capsys, *, ramps, events):
    display = Display(epochs={0: 2, 1: 2}, steps=9, ramps=ramps)
    for event in events:
        display.show(event)
    return capsys.readouterr().err


def test_an_attach_rate_that_never_changes_is_not_shown(capsys):
    events = (CycleStart(1), epoch())
    assert "attach" not in shown(capsys, ramps=False, events=events)
    said = shown(capsys, ramps=True, events=(CycleStart(1), epoch(0.25)))
    assert "attach" in said
    assert " 0.25 " in said


def test_a_run_resumed_inside_a_phase_prints_the_header_of_its_table(capsys):
    said = shown(capsys, ramps=False, events=(epoch(), epoch()))
    assert said.count("phase") == 1
    assert said.index("phase") < said.index("cycle 1/1")


def test_fused_weights_to_start_from_are_answered_with_the_plain_form(few_blocks, small_run, capsys):
    fused = small_run.folder / "fused.pt"
    said = one_line(capsys, "train", "--dataset", "digits", "--init", fused)
    assert f"repan fuse {fused} --form conv-bn" in said


def test_an_image_that_cannot_be_read_is_told_with_the_way_out(tmp_path, caplog):
    root = write_folders(tmp_path / "photos")
    broken = next((root / "train" / "ant").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=f"{broken.name}.*; data.on_error=skip skips such training images"):
        datasets.load("folder", root)
    datasets.load("folder", root, on_error="skip")
    assert "1 of 12 images of the training folder cannot be read and is left out" in caplog.text
    scored = next((root / "test" / "bee").iterdir())
    scored.write_bytes(b"")
    with pytest.raises(InputError, match=f"{scored.name}.*; repair or remove it"):
        datasets.load("folder", root, on_error="skip")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("list", "missing argument 'KIND': models, blocks, datasets, optimizers, presets, runs"),
        ("fuse", "missing argument 'CHECKPOINT': a file "),
        ("study", "missing argument 'GRID': a YAML file of arms, or a built-in grid: full, quick, small, whole; see"),
    ],
)
def test_a_missing_argument_is_reported_with_its_possible_values(capsys, command, told):
    said = one_line(capsys, command)
    assert said.startswith(f"Error: {told}")
    assert said.endswith(f"; see 'repan {command} --help'\n")


def test_a_folder_without_one_readable_image_is_refused(tmp_path):
    root = write_folders(tmp_path / "photos")
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 12 images of a folder can be read; one: "):
        datasets.load("folder", root, on_error="skip")


def test_code_of_a_persons_own_is_asked_for_at_once():
    said = own_block.how_to_give("my.py:build", "best.pt", "net.py:build")
    assert "a network and blocks of your own, net.py:build and my.py:build" in said
    assert "give --model net.py:build --block my.py:build (" in said
    only = own_block.how_to_give("my.py:build", "best.pt", "timm:resnet18")
    assert "give --block my.py:build (" in only
    assert "network" not in only


def test_runs_without_a_control_are_not_called_one(tmp_path, capsys):
    write_run(tmp_path / "a")
    only = compare([results.read_result(tmp_path / "a")])
    assert "control" not in table.rows(only)[0]
    write_run(tmp_path / "b", cycle__rule="reset")
    _, _, err = run(capsys, "compare", tmp_path)
    assert "these runs have no control: the first group takes its place; choose another with --control RUN" in err


def test_names_in_tables_stay_whole_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    name = "stages.1.blocks.2.conv_pwl"
    titles = ["layer", "channel spread", "input outlier", "weights dB", "by channel dB", "input dB"]
    print_table(titles, [(name, "1.4", "4.6", "41.5", "43.9", "23.0")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{name} ") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [(48_800, "48.8 k"), (0.9e6, "900 k"), (3.53e6, "3.53 M"), (1.8e9, "1.8 G"), (12, "12"), (999_999, "1 M")],
)
def test_counts_of_small_networks_are_readable(number, text):
    assert short(number) == text


@pytest.mark.parametrize(("size", "text"), [(8_600, "8.4 KiB"), (2**20, "1.00 MiB"), (150_000, "0.14 MiB")])
def test_sizes_of_small_files_are_readable(size, text):
    assert file_size(size) == text


def test_a_summary_shows_its_figures(tmp_path):
    found = door.read_summary(write_run(tmp_path / "a", test=71.25))
    assert repr(found) == f"Summary({str(tmp_path / 'a')!r}, val_top1=70.00, test_top1=71.25)"
    assert repr(door.Summary(Path(), {})) == "Summary('.')", "other processes than the first have no figures"


@pytest.mark.parametrize(
    ("held", "fraction", "digest", "mend"),
    [
        (1, 0.1, "drawn", "1 validation image, so it is partly chance: set data.val_fraction=0.3"),
        (49, 0.3, "drawn", "49 validation images, so it is partly chance: more images help"),
        (49, 0.1, "", "49 validation images, so it is partly chance: more images help"),  # a folder `val`
        (50, 0.1, "drawn", None),
        (None, 0, "", None),
    ],
)
def test_few_images_that_choose_the_epoch_are_reported_with_the_setting(
    caplog, monkeypatch, held, fraction, digest, mend
):
    monkeypatch.setattr(notices, "_SAID", set())
    val = held and SimpleNamespace(labels=range(held))
    for _ in range(2):  # of a series, too, it is said once
        build._warn_of_few_to_choose(fraction, SimpleNamespace(val=val, split_digest=digest))
    assert caplog.messages == ([f"the best epoch is chosen on only {mend}"] if mend else [])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"cycle__schedule": "continuous"},
            "baseline of 3 epochs; 2 cycles of 4 epochs, {}; one cosine schedule over all, from lr 0.2",
        ),
        (
            {"cycle__schedule": "restart", "cycle__restart": "none", "optim__schedule": "linear"},
            "baseline of 3 epochs at lr 0.2; 2 cycles of 4 epochs at lr 0.05, no restarts (control); a new linear "
            "schedule in each cycle",
        ),
    ],
)
def test_the_plan_of_a_run_is_told_with_its_schedule(settings, told):
    given = {"baseline__epochs": "3", "epochs": "4", "cycle__count": "2", "baseline__optim__lr": "0.2"}
    phases = plan(**given, optim__lr="0.05", **settings)
    assert summary._describe_plan(phases) == told.format("each begins with a restart (calibrate, ramp)")
    (only,) = training_plan(config.build({"epochs": "3", "optim.lr": "0.1"}))
    assert summary._describe_plan((only,)) == "3 epochs at lr 0.1"


def test_no_line_of_the_changelog_stands_twice():
    section = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    items = [line for line in section.splitlines() if line.startswith("- ")]
    assert len(items) == len(set(items))


def test_a_table_in_a_file_has_no_spaces_at_the_ends_of_lines(capsys):
    print_table(["name", "value"], [("a", "1"), ("longer", "a much longer value"), ("empty", "")])
    assert capsys.readouterr().out == "name    value\na       1\nlonger  a much longer value\nempty\n"
