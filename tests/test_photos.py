"""Folders of photographs as people have them: classes without parts, a root one level off, sizes of all kinds."""

import shutil

import numpy as np
import pytest
from PIL import Image
from support import one_line, write_folders

from repan_cli import config
from repan_cli.data import class_folders, datasets
from repan_cli.errors import InputError


def flat(root, classes=("ant", "bee"), *, images=10, size=16):
    """Write `root/<class>/<number>.png`."""
    draw = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images):
            picture = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return root


def test_classes_without_parts_are_split_by_the_seed_alone(tmp_path, caplog):
    root = flat(tmp_path / "photos")
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
    assert f"{root} has no parts: 4 of the 20 images are drawn as its test part" in caplog.text


@pytest.mark.parametrize("inside", ["set", "deep/set"])
def test_a_root_one_or_two_levels_too_high_is_answered_with_the_folder(tmp_path, inside):
    write_folders(tmp_path / "up" / inside)
    with pytest.raises(InputError, match=f"is no data set of image folders; did you mean --data-root .*up/{inside}"):
        datasets.load("folder", tmp_path / "up")
    flat(tmp_path / "flat" / inside)
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
    flat(tmp_path / "photos")
    with pytest.raises(InputError, match="did you mean --data-root .*photos"):
        datasets.check("folder", tmp_path / "photos" / "ant")


def test_several_sets_in_a_folder_are_no_classes(tmp_path):
    write_folders(tmp_path / "one")
    write_folders(tmp_path / "two")
    with pytest.raises(InputError, match="did you mean --data-root .*one"):
        datasets.check("folder", tmp_path)


def test_parts_inside_of_classes_are_no_set(tmp_path):
    flat(tmp_path / "ant", ("train", "test"))
    flat(tmp_path / "bee", ("train", "test"))
    with pytest.raises(InputError, match=r"expected .*/train/<class>/\* and"):
        datasets.check("folder", tmp_path)


def test_loose_images_are_said_to_need_class_folders(tmp_path):
    root = flat(tmp_path / "photos" / "inner") / "ant"
    shutil.move(root, tmp_path / "loose")
    shutil.rmtree(tmp_path / "photos")
    tmp_path /= "loose"
    with pytest.raises(InputError, match=r"holds 0\.png and no class folders: expected"):
        datasets.check("folder", tmp_path)


def test_a_folder_is_a_data_set(tmp_path, monkeypatch, capsys):
    flat(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    found = config.resolve("train", None, {"data.name": "photos", "model.name": "repvgg"})
    assert (found.config.data.name, found.config.data.root) == ("folder", "photos")
    assert found.source.startswith("recipes/folder")
    both = ("train", "--dataset", "photos", "--data-root", "photos", "--model", "repvgg")
    assert "data.name=photos is a folder, and data.root=photos another: give one" in one_line(capsys, *both)
    (tmp_path / "digits").mkdir()
    assert config.resolve("train", None, {"data.name": "digits", "model.name": "repvgg"}).config.data.name == "digits"


def test_the_names_of_parts_are_no_classes(tmp_path):
    flat(tmp_path / "photos", ("ant", "train"))
    assert not class_folders.is_flat(tmp_path / "photos")
