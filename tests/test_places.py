"""Places of files: found again from another folder, and not told to others."""

import dataclasses
import json
from pathlib import Path

import pytest
from support import StopAt, card_of, one_line, run, small_net

from repan_cli import checkpoint, config, runs
from repan_cli.checkpoint.published import for_others
from repan_cli.config.conventions import PLACES
from repan_cli.config.settings import OVERLAY, SCHEMA
from repan_cli.session import places
from repan_cli.system import user_code
from repan_cli.system.text import at_home, from_home

TINY = "--model repvgg_a0 data.batch_size=256 run.precision=fp32 run.log_every=2 --epochs 2 --device cpu".split()  # noqa: SIM905

NET = """
from torch import nn

def net(num_classes, in_chans):
    return nn.Sequential(
        nn.Conv2d(in_chans, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that a run begins in, which is the current one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def settings_of(**values):
    return config.from_flat({key.replace("__", "."): value for key, value in values.items()})


def test_relative_paths_are_noted_as_absolute_ones(here):
    for name in ("t.pt", "b.pt", "order.txt"):
        Path(name).touch()
    settings = settings_of(
        data__name="folder",
        data__class_order="order.txt",
        teacher__name="t.pt::ema",
        baseline__teacher__name="b.pt",
        model__init="t.pt",
    )
    assert places.noted(settings)[PLACES] == {
        "data.root": f"{here}/data",
        "data.class_order": f"{here}/order.txt",
        "teacher.name": f"{here}/t.pt::ema",
        "baseline.teacher.name": f"{here}/b.pt",
    }


def test_words_names_and_absolute_paths_are_not_noted(here):
    settings = settings_of(data__name="digits", teacher__name="timm:resnet18", data__class_order="natural")
    assert places.noted(settings) == {}
    settings = settings_of(data__name="folder", data__root=str(here), teacher__name=str(here / "t.pt"))
    assert places.noted(settings) == {}


def test_what_is_there_as_typed_is_taken_before_what_was_noted(here, tmp_path, monkeypatch):
    Path("t.pt").touch()
    typed = {"teacher.name": "t.pt", "data.name": "digits"}
    around = {PLACES: {"teacher.name": f"{here}/t.pt"}}
    assert places.found(typed, around) == {}
    monkeypatch.chdir(tmp_path / "there")
    assert places.found(typed, around) == {"teacher.name": f"{here}/t.pt"}
    (here / "t.pt").unlink()
    assert places.found(typed, around) == {}


def test_the_place_of_the_data_in_older_files_is_read(here, tmp_path, monkeypatch):
    (here / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    settings = {"data.name": "folder", "data.root": "photos"}
    card = card_of(small_net(), config=settings, surroundings={"data_root": f"{here}/photos"})
    assert places.data_root(card) == f"{here}/photos"


@pytest.mark.parametrize("bad", [7, None, [], {"data.root": 3}, {"run.out": "x", "model.name": "evil.py:f"}])
def test_places_in_a_file_of_anybody_change_nothing_else(here, bad):
    settings = {"data.name": "folder", "data.root": "gone", "model.name": "repvgg", "run.out": "y"}
    assert places.found(settings, {PLACES: bad}) == {}


def test_every_setting_that_holds_a_path_is_thought_of():
    """Found again, given again as code is, or not read when a run goes on: its folder, the weights it began with."""
    paths = {key for key, entry in {**SCHEMA, **OVERLAY}.items() if entry.path}
    not_read = {"model.init", "run.out", "data.name"}
    assert paths == {*places.READ_AGAIN, *user_code.OPTIONS, *not_read}


def stopped(capsys, command, *words):
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        code, _, err = run(capsys, command, *TINY, *words)
    assert code == 75, err
    return err


@pytest.mark.slow
def test_a_teacher_is_found_again_from_another_folder(here, tmp_path, monkeypatch, capsys, few_blocks):
    Path("files").mkdir()
    net = small_net(in_chans=1)
    card = card_of(net, in_chans=1, mean=(0.3,), std=(0.4,))
    checkpoint.save(checkpoint.capture(net, card), Path("files/t.pt"))
    stopped(capsys, "distill", "--dataset", "digits", "--teacher", "files/t.pt", "--out", "run")
    monkeypatch.chdir(tmp_path / "there")
    code, _, err = run(capsys, "distill", "--resume", here / "run")
    assert code == 0, err
    assert checkpoint.load(here / "run" / "last.pt").card.config["teacher.name"] == f"{here}/files/t.pt"


@pytest.mark.slow
def test_a_teacher_of_a_users_own_network_is_given_again(here, tmp_path, monkeypatch, capsys, few_blocks):
    Path("net.py").write_text(NET)
    code, _, err = run(capsys, "train", "--model", "net.py:net", *TINY[2:], "--dataset", "digits", "--out", "teacher")
    assert code == 0, err
    words = ("--dataset", "digits", "--teacher", "teacher", "teacher.model=net.py:net", "--out", "run")
    err = stopped(capsys, "distill", *words)
    assert "--resume run teacher.model=net.py:net" in err
    assert "--resume run teacher.model=net.py:net" in run(capsys, "list", "runs", "run")[1].replace("\n", " ")
    monkeypatch.chdir(tmp_path / "there")
    said = one_line(capsys, "distill", "--resume", here / "run")
    assert "a teacher that is a network of your own, net.py:net: give teacher.model=net.py:net" in said
    code, _, err = run(capsys, "distill", "--resume", here / "run", f"teacher.model={here}/net.py:net")
    assert code == 0, err


def test_a_series_notes_its_places(here, tmp_path, monkeypatch, capsys, few_blocks):
    from repan_cli.commands import series

    Path("photos").mkdir()
    settings = settings_of(data__name="folder", data__root="photos", model__name="repvgg")
    (here / "s").mkdir()
    (here / "s" / "config.yaml").write_text(config.dump(settings, cycles=False))
    about = {"command": "train", "seeds": [0], "control": False, "settings": "", **places.noted(settings)}
    (here / "s" / runs.SERIES).write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path / "there")
    read = runs.read_series(here / "s")
    assert read is not None
    assert series._settings_of("train", here / "s", {}, read).config.data.root == f"{here}/photos"


# ---------------------------------------------------------------------------------------------- told to nobody


def test_a_path_below_the_home_folder_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_home(f"{tmp_path}/a/b.pt") == "~/a/b.pt"
    assert at_home(from_home(f"{tmp_path}/a/b.pt")) == f"{tmp_path}/a/b.pt"
    for other in (f"{tmp_path}_more/a", "a/b", "timm:resnet18", str(tmp_path)[:-1] + "/a"):
        assert from_home(other) == other
    monkeypatch.setenv("HOME", "/")
    assert from_home("/data/a") == "/data/a"


def card_of_an_author(home):
    settings = {
        "model.name": f"{home}/net.py:net",
        "data.name": "folder",
        "data.root": f"{home}/clients/photos",
        "model.init": f"{home}/w.pt::ema",
        "teacher.name": f"{home}/t.pt",
        "run.out": f"{home}/runs/x",
        "epochs": 3,
    }
    around = {"torch": "2", PLACES: {"data.root": f"{home}/clients/photos", "teacher.name": f"{home}/t.pt"}}
    card = card_of(small_net(), config=settings, surroundings=around, teachers={f"{home}/t.pt": "abc"})
    native = {"block": f"{home}/blocks.py:build", "branches": None}
    structure = dataclasses.replace(card.structure, native=native)
    return dataclasses.replace(card, model=f"{home}/net.py:net", block=native["block"], structure=structure)


def test_files_for_others_do_not_tell_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    card = for_others(card_of_an_author(tmp_path))
    assert str(tmp_path) not in json.dumps(card.as_meta())
    assert at_home(card.config["data.root"]) == f"{tmp_path}/clients/photos"
    assert (card.config["model.init"], card.config["teacher.name"]) == ("w.pt::ema", "t.pt")
    assert (card.config["run.out"], card.config["epochs"]) == ("x", 3)
    assert card.surroundings == {"torch": "2", PLACES: {"data.root": "~/clients/photos"}}
    assert card.teachers == {"t.pt": "abc"}
    published = for_others(card_of_an_author(tmp_path), keeps_place=False)
    assert "clients" not in json.dumps(published.as_meta())
    assert published.surroundings == {"torch": "2"}


@pytest.mark.parametrize(
    "ending", ["pt", "safetensors", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("onnx", "pt2"))]
)
def test_merged_files_tell_no_home_folder_and_find_their_data(tmp_path, monkeypatch, capsys, few_blocks, ending):
    home = tmp_path / "home" / "someone"
    (home / "digits").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    net = small_net()
    settings = {"data.name": "folder", "data.root": "digits", "teacher.name": f"{home}/t.pt"}
    card = card_of(net, config=settings, surroundings={PLACES: {"data.root": f"{home}/digits"}})
    checkpoint.save(checkpoint.capture(net, card), home / "best.pt")
    code, _, err = run(capsys, "fuse", "best.pt", "--out", f"net.{ending}")
    assert code == 0, err
    assert str(home).encode() not in (home / f"net.{ending}").read_bytes()
    monkeypatch.chdir(tmp_path)
    if ending in ("pt", "safetensors"):
        assert places.data_root(checkpoint.load(home / f"net.{ending}").card) == f"{home}/digits"


# ---------------------------------------------------------------------------------------------- finished runs


def test_a_finished_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    from repan_cli.commands import early
    from repan_cli.errors import InputError

    def write(cycles, **values):
        settings = settings_of(data__name="digits", model__name="repvgg", **values)
        (tmp_path / "config.yaml").write_text(config.dump(settings))
        (tmp_path / "env.json").write_text(json.dumps({"command": "cycle"}))
        (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
        (tmp_path / "summary.json").write_text(json.dumps({"cycles": [{}] * cycles}))

    def refused(command="cycle", given=None):
        early.check("series", command, str(tmp_path), given or {})

    write(2, cycle__count=2, cycle__schedule="restart")
    with pytest.raises(InputError, match="is finished; to train more than its 2 cycles, give --cycles N"):
        refused()
    refused(given={"cycle.count": "3"})
    refused("train")  # told by what reads the run
    write(6, cycle__count=2, cycle__schedule="restart")  # which were asked for once
    with pytest.raises(InputError, match="to train more than its 6 cycles, give --cycles N"):
        refused()
    write(2, cycle__count=2)
    with pytest.raises(InputError, match="begin another run from its weights with --init"):
        refused()
    (tmp_path / "status.json").write_text(json.dumps({"state": "interrupted"}))
    refused()
    (tmp_path / "status.json").write_text(json.dumps({"state": "done"}))
    (tmp_path / "summary.json").unlink()
    refused()
