"""Image folders in common layouts, the order of their classes, and the classes that a weights file stores."""

import errno
import json
import os
import unicodedata

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from support import one_line, run, write_flat_folders, write_folders

from repan_cli.data import class_folders, datasets
from repan_cli.errors import InputError
from repan_cli.session.artifact import open_artifact


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def moved(root, part, other):
    (root / part).rename(root / other)
    return root


# ---------------------------------------------------------------------------------------------- folders


def test_images_deeper_inside_a_class_are_found(tmp_path):
    write_folders(tmp_path)
    picture(tmp_path / "train" / "ant" / "2024" / "may" / "a.png")
    picture(tmp_path / "train" / "bee" / "x" / "a.JFIF")
    (tmp_path / "train" / "bee" / "x" / "around").symlink_to(tmp_path / "train" / "bee")
    data = datasets.load("folder", tmp_path, val_fraction=0)
    assert np.bincount(data.train.labels).tolist() == [7, 7]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "VAL", "Valid"])
def test_every_name_of_the_validation_part_is_known(tmp_path, name):
    moved(write_folders(tmp_path, parts=("train", "val", "test")), "val", name)
    assert len(datasets.load("folder", tmp_path).val.labels) == 12


def test_the_other_parts_have_other_names_as_well(tmp_path):
    moved(moved(write_folders(tmp_path), "train", "Training"), "test", "testing")
    assert len(datasets.load("folder", tmp_path, val_fraction=0).test.labels) == 12


@pytest.mark.parametrize("ending", ["gif", "jfif", "jpe", "avif", "GIF"])
def test_every_ending_that_pillow_reads(tmp_path, ending):
    if f".{ending.lower()}" not in class_folders.EXTENSIONS:
        pytest.skip("this Pillow does not read it")
    write_folders(tmp_path)
    picture(tmp_path / "train" / "ant" / f"new.{ending}")
    assert len(datasets.load("folder", tmp_path, val_fraction=0).train.labels) == 13


def test_skipped_files_are_named_and_counted(tmp_path, caplog):
    write_folders(tmp_path)
    (tmp_path / "extra" / "ant").mkdir(parents=True)
    for name in ("a.heic", "b.HEIC", "notes.txt", "noending"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    datasets.load("folder", tmp_path)
    assert f"skipped 1 folder of {tmp_path} that do not belong to a data set: extra" in caplog.text
    assert "4 files" in caplog.text
    assert ".heic 2, no ending 1, .txt 1" in caplog.text


JUNK = (
    *("__MACOSX/train/ant/._0.png", "train/ant/._0.png", "train/@eaDir/0.png/thumb.jpg", "train/ant/Thumbs.db"),
    *("train/.ipynb_checkpoints/0.png", "train/ant/.ipynb_checkpoints/0-checkpoint.png", "train/__MACOSX/a.png"),
    *("train/ant/@eaDir/0.png", "train/ant/desktop.ini", "train/#recycle/0.png", "train/ant/.DS_Store", "lost+found/a"),
)


@pytest.mark.parametrize("junk", JUNK)
def test_files_of_the_system_are_never_data(tmp_path, caplog, junk):
    write_folders(tmp_path)
    (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / junk).write_bytes(b"no image")
    data = datasets.load("folder", tmp_path, val_fraction=0)
    assert (data.classes, len(data.train.labels)) == (("ant", "bee"), 12)
    assert not caplog.text


def test_a_training_part_alone_gives_a_test_part(tmp_path, caplog):
    write_folders(tmp_path, parts=("train",), count=20)
    data = datasets.load("folder", tmp_path, val_fraction=0.1)
    assert "8 of the 40 training images of folder become the test part" in caplog.text
    assert [np.bincount(part.labels).tolist() for part in (data.train, data.val, data.test)] == [
        [14, 14],
        [2, 2],
        [4, 4],
    ]
    again, other = (datasets.load("folder", tmp_path, split_seed=seed) for seed in (0, 1))
    assert np.array_equal(again.test.images, data.test.images)
    assert again.split_digest == data.split_digest != other.split_digest
    assert not np.array_equal(other.test.images, data.test.images)
    assert datasets.load("folder", tmp_path, val_fraction=0).split_digest


# ---------------------------------------------------------------------------------------------- names of classes


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("caf\u00e9", "th\u00e9", "\uac00"):
            picture(tmp_path / part / unicodedata.normalize(form, name) / "0.png")
    picture(tmp_path / "train" / unicodedata.normalize("NFD", "caf\u00e9") / "1.png", 7)
    data = datasets.load("folder", tmp_path, val_fraction=0)
    assert data.classes == ("caf\u00e9", "th\u00e9", "\uac00")
    assert data.train.labels.tolist() == [0, 0, 1, 2]


def test_the_order_of_classes_is_reported(tmp_path):
    write_folders(tmp_path, classes=[str(number) for number in range(1, 13)], count=1)
    text = datasets.load("folder", tmp_path, val_fraction=0)
    assert text.classes[:3] == ("1", "10", "11")
    assert datasets.load("folder", tmp_path, val_fraction=0, class_order="natural").classes[:3] == ("1", "2", "3")
    (tmp_path / "order").write_text("\ufeff" + "\n".join(str(number) for number in range(12, 0, -1)), encoding="utf-8")
    listed = datasets.load("folder", tmp_path, val_fraction=0, class_order=str(tmp_path / "order"))
    assert listed.classes[:3] == ("12", "11", "10")
    (tmp_path / "order").rename(tmp_path / "classes.txt")
    assert datasets.load("folder", tmp_path, val_fraction=0).classes == listed.classes
    (tmp_path / "classes.txt").write_text("1\n2\nthree\n")
    with pytest.raises(InputError, match=r"classes\.txt lacks 10 of the classes"):
        datasets.load("folder", tmp_path, val_fraction=0)
    with pytest.raises(InputError, match=r"cannot read the list of classes .*nothing: No such file"):
        datasets.load("folder", tmp_path, class_order=str(tmp_path / "nothing"))


# ---------------------------------------------------------------------------------------------- weights and their data


@pytest.fixture
def hub(tmp_path):
    """A folder of the Hub, with a network of twelve classes."""
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=12).state_dict()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    described = {
        "architecture": "test_resnet",
        "num_classes": 12,
        "label_names": [str(number) for number in range(1, 13)],
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64], "crop_pct": 0.9},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def numbers(tmp_path):
    return write_folders(tmp_path / "numbers", classes=[str(n) for n in range(1, 13)], count=1, size=(64, 64))


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_folder_of_the_hub_describes_its_network(hub, name):
    found = open_artifact(str(hub / name))
    card = found.card
    assert (card.model, card.image_size, card.crop_share) == ("timm:test_resnet", 64, 0.9)
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert card.classes[:3] == ("1", "2", "3")


def test_the_classes_in_a_file_order_the_data(capsys, hub, numbers):
    words = ("--dataset", "folder", "--data-root", numbers, "--json")
    code, out, err = run(capsys, "evaluate", hub, *words)
    assert (code, err) == (0, "")
    assert list(json.loads(out)["class_top1"])[:3] == ["1", "2", "3"]
    (hub / "config.json").unlink()
    code, out, err = run(capsys, "evaluate", hub / "model.safetensors", "--model", "timm:test_resnet", *words)
    assert code == 0
    assert "does not name its classes: its outputs are assumed to be the folders in the order 1, 10" in err
    assert "by number they are 1, 2, 3, ...: --classes natural" in err
    code, out, err = run(
        capsys, "evaluate", hub / "model.safetensors", "--model", "timm:test_resnet", *words, "--classes", "natural"
    )
    assert (code, err) == (0, "")
    assert list(json.loads(out)["class_top1"])[:3] == ["1", "2", "3"]


def test_without_a_description_timm_knows_the_preparation_of_a_name(hub):
    (hub / "config.json").unlink()
    card = open_artifact(str(hub / "model.safetensors"), "timm:test_resnet").card
    wanted = timm.get_pretrained_cfg("test_resnet")
    assert card.image_size == wanted.input_size[-1]
    assert card.mean == wanted.mean


@pytest.mark.parametrize("content", ["{", "[]", '{"architecture": "bert"}', '{"architecture": 3}', "\xff"])
def test_a_description_of_something_else_is_none(hub, content):
    (hub / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="give --model NAME"):
        open_artifact(str(hub))


def test_only_the_part_that_is_evaluated_is_needed(capsys, hub, tmp_path):
    write_folders(tmp_path / "d", parts=("test",), classes=[str(n) for n in range(1, 13)], count=1, size=(64, 64))
    code, out, err = run(capsys, "evaluate", hub, "--dataset", "folder", "--data-root", tmp_path / "d", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["images"] == 12
    assert "no folder for the part train" in one_line(
        capsys, "evaluate", hub, "--dataset", "folder", "--data-root", tmp_path / "d", "--split", "train"
    )


@pytest.mark.parametrize("command", ["evaluate", pytest.param("quantize", marks=pytest.mark.soak)])
def test_a_folder_is_taken_as_the_data_set(capsys, hub, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    classes = [str(n) for n in range(1, 13)]
    write_folders(tmp_path / "d", parts=("train", "test"), classes=classes, count=2, size=(64, 64))
    more = ("--out", tmp_path / "int8.onnx", "--overwrite") if command == "quantize" else ()
    for place in (tmp_path / "d", "~/d") if command == "evaluate" else ("~/d",):  # int8 takes seconds
        code, _, err = run(capsys, command, hub, "--dataset", place, "--json", *more)
        assert code == 0, err
    both = one_line(capsys, command, hub, "--dataset", tmp_path / "d", "--data-root", tmp_path, *more)
    assert "is a folder, and data.root=" in both


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    """Python's walk through folders leaves such a one out."""
    write_folders(tmp_path)
    picture(tmp_path / "train" / "bee" / "deep" / "one.png")
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("deep"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(OSError, match="Input/output error: .*deep"):
        datasets.load("folder", tmp_path)


def test_no_image_is_asked_whether_it_is_a_folder(tmp_path, monkeypatch):
    """With a million images on a network drive that took minutes, at each of several looks."""
    root, asked = write_flat_folders(tmp_path / "photos", ("ant", "bee", "cow")), []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (asked.append(str(path)), stat(path, **options))[1])
    assert class_folders.part_folders(root) == {"train": root}
    assert [*class_folders.class_folders(root)] == ["ant", "bee", "cow"]
    assert asked
    assert not [path for path in asked if path.endswith(".png")]


def test_a_folder_may_be_a_link(tmp_path):
    root = write_flat_folders(tmp_path / "photos", ("ant", "bee"))
    (root / "ant").rename(tmp_path / "elsewhere")
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert [*class_folders.class_folders(root)] == ["ant", "bee"]
