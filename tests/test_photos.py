"""Folders of photographs: classes without parts, a root one level off, images of all sizes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import StopAt, one_line, run, write_flat_folders, write_folders

from repan_cli import checkpoint, config, models
from repan_cli.data import class_folders, datasets
from repan_cli.errors import InputError
from repan_cli.runs import directory


def test_classes_without_parts_are_split_by_the_seed_alone(tmp_path, caplog):
    root = write_flat_folders(tmp_path / "photos")
    first, again = (datasets.load("folder", root, val_fraction=0.25) for _ in range(2))
    other = datasets.load("folder", root, val_fraction=0.25, split_seed=1)
    assert [np.bincount(part.labels).tolist() for part in (first.train, first.val, first.test)] == [
        [6, 6],
        [2, 2],
        [2, 2],
    ]
    assert first.split_digest == again.split_digest != other.split_digest
    assert np.array_equal(first.test.images, again.test.images)
    seen = [image.tobytes() for part in (first.train, first.val, first.test) for image in part.images]
    assert len(set(seen)) == 20
    assert f"{root} has no folders train and test: 4 of the 20 images become the test part" in caplog.text


@pytest.mark.parametrize("inside", ["set", "deep/set"])
def test_a_root_one_or_two_levels_too_high_is_answered_with_the_folder(tmp_path, inside):
    write_folders(tmp_path / "up" / inside)
    with pytest.raises(InputError, match=f"is not a data set of image folders; did you mean --data-root .*up/{inside}"):
        datasets.load("folder", tmp_path / "up")
    write_flat_folders(tmp_path / "flat" / inside)
    with pytest.raises(InputError, match=f"did you mean --data-root .*flat/{inside}"):
        datasets.check("folder", tmp_path / "flat")


@pytest.mark.parametrize("inside", ["train", "test", "train/ant", "test/bee"])
def test_a_root_too_deep_is_answered_with_the_folder(tmp_path, monkeypatch, inside):
    write_folders(tmp_path / "my photos")
    with pytest.raises(InputError, match="did you mean --data-root '.*my photos'"):
        datasets.load("folder", tmp_path / "my photos" / inside)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="did you mean --data-root 'my photos'"):
        datasets.check("folder", f"my photos/{inside}")


def test_a_class_of_a_set_without_parts_is_answered_with_the_set(tmp_path):
    write_flat_folders(tmp_path / "photos")
    with pytest.raises(InputError, match="did you mean --data-root .*photos"):
        datasets.check("folder", tmp_path / "photos" / "ant")


def test_several_sets_in_a_folder_are_no_classes(tmp_path):
    write_folders(tmp_path / "one")
    write_folders(tmp_path / "two")
    with pytest.raises(InputError, match="did you mean --data-root .*one"):
        datasets.check("folder", tmp_path)


def test_parts_inside_of_classes_are_no_set(tmp_path):
    write_flat_folders(tmp_path / "ant", ("train", "test"))
    write_flat_folders(tmp_path / "bee", ("train", "test"))
    with pytest.raises(InputError, match=r"expected .*/train/<class>/\* and"):
        datasets.check("folder", tmp_path)


def test_loose_images_need_class_folders(tmp_path):
    root = write_flat_folders(tmp_path / "photos" / "inner") / "ant"
    shutil.move(root, tmp_path / "loose")
    shutil.rmtree(tmp_path / "photos")
    tmp_path /= "loose"
    with pytest.raises(InputError, match=r"holds 0\.png and no class folders: expected"):
        datasets.check("folder", tmp_path)


def test_a_folder_is_a_data_set(tmp_path, monkeypatch, capsys):
    write_flat_folders(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    found = config.resolve("train", None, {"data.name": "photos", "model.name": "repvgg"})
    assert (found.config.data.name, found.config.data.root) == ("folder", "photos")
    assert found.source.startswith("recipes/folder")
    both = ("train", "--dataset", "photos", "--data-root", "photos", "--model", "repvgg")
    assert "data.name=photos is a folder, and data.root=photos is another: give one" in one_line(capsys, *both)
    (tmp_path / "digits").mkdir()
    assert config.resolve("train", None, {"data.name": "digits", "model.name": "repvgg"}).config.data.name == "digits"


def test_the_names_of_parts_are_no_classes(tmp_path):
    write_flat_folders(tmp_path / "photos", ("ant", "train"))
    assert not class_folders.is_flat(tmp_path / "photos")


# ---------------------------------------------------------------------------------------------- the size of images


def mixed(root):
    """Write photographs of sizes of their own: no two classes begin alike."""
    for name, size in (("ant", (90, 70)), ("bee", (200, 240))):
        (root / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (size[0] + number, size[1]), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_photographs_get_the_size_of_the_network_whatever_comes_first(tmp_path, seed):
    data = datasets.load("folder", mixed(tmp_path), network_size=224, split_seed=seed)
    assert data.image_size == 224


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("timm:resnet18", 224), ("resnet18", 224), ("repvgg", 224), ("repvgg_a1_cifar", 32), ("resnet110", 32)),
        *(("torchvision:inception_v3", 299), ("timm:resnet18d.ra4_e3600_r224_in1k", 224), ("net.py:build", None)),
    ],
)
def test_the_size_that_a_network_is_made_for(name, size):
    assert models.wanted_size(name) == size


def test_small_pictures_of_one_size_keep_it(tmp_path):
    write_flat_folders(tmp_path / "small", size=20)
    assert datasets.load("folder", tmp_path / "small", network_size=224).image_size == 20
    write_flat_folders(tmp_path / "large", size=80)
    assert datasets.load("folder", tmp_path / "large", network_size=32).image_size == 32
    assert datasets.load("folder", tmp_path / "large", network_size=32, image_size=40).image_size == 40


@pytest.mark.slow
def test_a_run_on_photographs_has_the_size_of_its_network(tmp_path, capsys):
    words = ("train", "--model", "repvgg_a0_cifar", "--dataset", mixed(tmp_path / "photos"), "--epochs", "1", "--out")
    code, _, err = run(capsys, *words, tmp_path / "run", "data.batch_size=4", "optim.lr=0.01")
    assert code == 0, err
    card = checkpoint.load(tmp_path / "run" / "last.pt").card
    assert (card.model, card.image_size) == ("repvgg_a0_cifar", 32)
    assert "images of 32x32" in " ".join(err.split())
    assert run(capsys, "evaluate", tmp_path / "run")[0] == 0


# ---------------------------------------------------------------------------------------------- from other folders

SMALL = ("--model", "repvgg_a0_cifar", "--epochs", "2", "data.batch_size=8", "optim.lr=0.01", "data.image_size=8")


def stopped(capsys, *words):
    """Begin a run, and stop it after some steps of its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        code, _, err = run(capsys, "train", *SMALL, *words)
    assert code == 75, err
    return err


def test_data_are_found_again_from_another_folder(tmp_path, monkeypatch, capsys, few_blocks):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_flat_folders(tmp_path / "here" / "photos")
    assert stopped(capsys, "--dataset", "photos", "--out", "my run").count("become the test part") == 1
    card = checkpoint.load("my run/last.pt").card
    assert card.config["data.root"] == "photos"
    env = json.loads(Path("my run/env.json").read_text())
    assert env["cwd"] == str(tmp_path / "here")
    assert env["git"] is None
    monkeypatch.chdir(tmp_path / "there")
    code, _, err = run(capsys, "train", "--resume", tmp_path / "here" / "my run")
    assert code == 0, err
    assert "repan evaluate '" in err  # a path with a space, quoted
    assert "become the test part" not in err  # as was told when the run began
    code, _, err = run(capsys, "evaluate", tmp_path / "here" / "my run" / "fused.pt")
    assert code == 0, err
    assert "become the test part" not in err
    Image.new("RGB", (16, 16)).save(tmp_path / "here" / "photos" / "ant" / "more.png")
    err = run(capsys, "evaluate", tmp_path / "here" / "my run" / "fused.pt")[2]
    assert "4 of the 21 images become the test part" in err  # another split
    assert "are not those held out for" in err


def test_the_commit_of_the_folder_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first")
    for command in (("git", "init", "-q"), words):
        subprocess.run(command, check=True)
    told = subprocess.run(("git", "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{40}", told)
    assert directory.git_commit() == told


@pytest.mark.slow
@pytest.mark.parametrize("harm", [pytest.param("header", marks=pytest.mark.soak), "pixels"])
def test_images_that_break_are_skipped_as_the_message_advises(tmp_path, monkeypatch, capsys, few_blocks, harm):
    monkeypatch.chdir(tmp_path)
    write_flat_folders(tmp_path / "photos")
    stopped(capsys, "--dataset", "photos", "--out", "run", "data.crop=resized")
    train = datasets.load("folder", "photos", image_size=8, crop="resized").train
    path = Path(train.read.name(int(train.index[-1])))
    path.write_bytes(b"no image" if harm == "header" else path.read_bytes()[:400])
    arguments = ("train", "--resume", "run")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert f"cannot read the image {path}" in err
    assert "data.on_error=skip" in err
    code, _, err = run(capsys, *arguments, "data.on_error=skip")
    assert code == 0, err


@pytest.mark.slow
def test_images_that_break_after_others_were_left_out_are_skipped_on_resume(tmp_path, monkeypatch, capsys, few_blocks):
    """The run knows which images it began without; the positions of all others stay."""
    monkeypatch.chdir(tmp_path)
    write_flat_folders(tmp_path / "photos")
    files = sorted((tmp_path / "photos").rglob("*.*"))
    files[1].write_bytes(b"no image")
    stopped(capsys, "--dataset", "photos", "--out", "run", "data.crop=resized", "data.on_error=skip")
    train = datasets.load("folder", "photos", image_size=8, crop="resized", on_error="skip").train
    path = Path(train.read.name(int(train.index[-1])))
    path.write_bytes(b"no image either")
    code, _, err = run(capsys, "train", "--resume", "run")
    assert code == 0, err
    assert f"cannot read the image {path}" in err
    files[1].write_bytes(files[2].read_bytes())  # a repaired image does not join later
    (tmp_path / "run" / "summary.json").unlink()
    assert run(capsys, "train", "--resume", "run")[0] == 0


def test_the_home_folder_is_known_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_flat_folders(tmp_path / "photos")
    Path(tmp_path / "mine.yaml").write_text("base: ~/other.yaml\ndata:\n  root: ~/photos\n  name: folder\n")
    Path(tmp_path / "other.yaml").write_text("model:\n  name: ~/net.py:build\nteacher:\n  name: ~/t.pt\n")
    found = config.resolve("distill", "~/mine.yaml", {"run.out": "~/run"}).config
    assert found.data.root == str(tmp_path / "photos")
    assert found.model.name == str(tmp_path / "net.py:build")
    assert (found.teacher.name, found.run.out) == (str(tmp_path / "t.pt"), str(tmp_path / "run"))
    assert config.resolve("train", None, {"data.name": "~/photos", "model.name": "repvgg"}).config.data.root == str(
        tmp_path / "photos"
    )
    (tmp_path / "old").mkdir()
    begin = ("train", "--model=repvgg", "--dataset=digits")
    assert f"{tmp_path}/old already exists" in one_line(capsys, *begin, "--out=~/old")
    assert f"no file {tmp_path}/gone.pt" in one_line(capsys, "info", "~/gone.pt")
    assert f"no run directory {tmp_path}/gone" in one_line(capsys, "train", "--resume=~/gone")
    assert f"unknown setting 'x' in {tmp_path}" not in one_line(capsys, *begin, "--config=~/gone.yaml")
