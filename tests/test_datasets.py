"""Data sets: reading, splitting, and the messages for data that cannot be read."""

import numpy as np
import pytest
from PIL import Image
from support import write_folders

from repan_cli.data import datasets
from repan_cli.data.subset import first_of_each, stratified
from repan_cli.data.types import DATASETS, ArrayImages, DatasetSpec, RawDataset
from repan_cli.errors import InputError


def test_digits_have_a_fixed_stratified_test_part(digits):
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert not digits.flip
    sizes = [len(part.labels) for part in (digits.train, digits.val, digits.test)]
    assert sum(sizes) == 1797
    assert 0.19 < sizes[2] / 1797 < 0.21
    shares = [np.bincount(part.labels) / len(part.labels) for part in (digits.train, digits.val, digits.test)]
    assert np.abs(shares[0] - shares[2]).max() < 0.01
    other = datasets.load("digits", "data", split_seed=5)
    assert np.array_equal(other.test.images, digits.test.images)
    assert other.split_digest != digits.split_digest


def test_the_parts_are_disjoint_and_the_split_repeats(digits):
    again = datasets.load("digits", "elsewhere")
    assert again.split_digest == digits.split_digest
    assert np.array_equal(again.val.images, digits.val.images)
    everything = datasets.load("digits", "data", val_fraction=0)
    assert everything.val is None
    assert len(everything.train.labels) == len(digits.train.labels) + len(digits.val.labels)


def test_stratified_holds_out_the_share_of_every_class_and_never_all():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 2 + [3])
    mask = stratified(labels, 0.1, seed=3)
    assert [int(mask[labels == label].sum()) for label in range(4)] == [10, 1, 1, 0]


def test_the_split_of_many_classes_takes_one_sort(monkeypatch):
    """By hand: each class in the drawn order. With a pass over all images for each class, ImageNet took 13 s."""
    labels = np.random.default_rng(1).integers(0, 700, 5000)
    order = np.random.default_rng(9).permutation(len(labels))
    expected = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        expected[members[: min(max(1, round(0.3 * len(members))), len(members) - 1)]] = True
    sorts, argsort = [], np.argsort
    monkeypatch.setattr(np, "argsort", lambda *args, **options: sorts.append(1) or argsort(*args, **options))
    monkeypatch.setattr(np, "flatnonzero", None)
    assert np.array_equal(stratified(labels, 0.3, 9), expected)
    assert first_of_each(np.array([1, 0, 1, 1, 0]), 2).tolist() == [True, True, True, False, True]
    assert len(sorts) == 2


def test_stated_statistics_of_digits_are_the_training_images(digits):
    pixels = digits.train.images / 255
    assert pixels.mean() == pytest.approx(digits.mean[0], abs=0.005)
    assert pixels.std() == pytest.approx(digits.std[0], abs=0.005)


def test_folders(tmp_path):
    data = datasets.load("folder", write_folders(tmp_path), val_fraction=0.2)
    assert data.classes == ("ant", "bee")
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [10, 2, 12]
    assert data.train.images.shape[1:] == (8, 8, 3)
    first = np.asarray(Image.open(tmp_path / "test" / "ant" / "0.png"))
    assert np.array_equal(data.test.images[0], first)


def test_folders_with_val_and_test_use_both(tmp_path):
    data = datasets.load("folder", write_folders(tmp_path, parts=("train", "val", "test")))
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [12, 12, 12]
    assert data.split_digest == ""


def test_folders_with_val_alone_report_on_it(tmp_path):
    data = datasets.load("folder", write_folders(tmp_path, parts=("train", "val")))
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [10, 2, 12]


def test_known_sets_are_read_from_image_folders(tmp_path):
    write_folders(tmp_path / "cifar100", size=(32, 32))
    data = datasets.load("cifar100", tmp_path)
    assert (data.name, data.image_size, data.flip) == ("cifar100", 32, True)


def test_a_whole_reduction_averages_pixels(tmp_path):
    write_folders(tmp_path, size=(8, 8))
    full = datasets.load("folder", tmp_path).test.images.astype(float)
    half = datasets.load("folder", tmp_path, image_size=4).test.images
    averaged = full.reshape(-1, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(half - averaged).max() <= 1


# ---------------------------------------------------------------------------------------------- a part of a set


def test_a_part_of_the_classes_is_the_first_by_name_in_every_part(digits):
    whole = datasets.load("digits", "data", val_fraction=0)
    part = datasets.load("digits", "data", classes=3, val_fraction=0)
    assert part.classes == ("0", "1", "2")
    for ours, theirs in ((part.train, whole.train), (part.test, whole.test)):
        assert np.array_equal(ours.images, theirs.images[theirs.labels < 3])
        assert np.array_equal(ours.labels, theirs.labels[theirs.labels < 3])
    assert part.labels_digest != whole.labels_digest
    everything = datasets.load("digits", "data", classes=10)
    assert (everything.classes, everything.split_digest) == (digits.classes, digits.split_digest)


def test_remaining_classes_keep_their_order_and_are_renumbered(monkeypatch):
    names, labels = ("wasp", "ant", "cow", "bee"), np.array([3, 0, 1, 2, 1, 3])
    images = ArrayImages(np.arange(6, dtype=np.uint8).repeat(16).reshape(6, 4, 4, 1), labels)
    spec = DatasetSpec("", lambda root, reading: RawDataset(names, {"train": images, "test": images}), (0,), (1,))
    monkeypatch.setitem(DATASETS._entries, "animals", spec)
    data = datasets.load("animals", "data", classes=2, val_fraction=0)
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [1, 0, 0, 1]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 5]


def test_the_first_images_of_each_class_train_and_the_test_part_stays(digits):
    part = datasets.load("digits", "data", per_class=20)
    assert (np.bincount(part.train.labels) == 18).all()
    assert (np.bincount(part.val.labels) == 2).all()
    assert np.array_equal(part.test.images, digits.test.images)
    whole, first = (datasets.load("digits", "data", val_fraction=0, per_class=count).train for count in (None, 5))
    for label in range(10):
        assert np.array_equal(first.images[first.labels == label], whole.images[whole.labels == label][:5])
    assert len(datasets.load("digits", "data", per_class=10**6).train.labels) == len(digits.train.labels)


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_a_part_of_folders_in_memory_and_read_one_by_one(tmp_path, crop):
    folder = write_folders(tmp_path, classes=("ant", "bee", "cow"), parts=("train", "val", "test"))
    data = datasets.load("folder", folder, crop=crop, classes=2, per_class=4)
    assert data.classes == ("ant", "bee")
    assert [part.labels.tolist() for part in (data.train, data.val)] == [[0] * 4 + [1] * 4, [0] * 6 + [1] * 6]
    last = np.asarray(Image.open(tmp_path / "train" / "bee" / "3.png"))
    train = data.train
    there = train.images[7] if crop == "pad" else np.asarray(train.read(int(train.index[7])))
    assert np.array_equal(there, last)


def test_a_part_that_cannot_be_is_reported(tmp_path):
    with pytest.raises(InputError, match="^data.classes=11, but digits has 10 classes: give at most as many$"):
        datasets.load("digits", "data", classes=11)
    with pytest.raises(
        InputError, match="one training image per class, .* data.val_fraction=0, or data.per_class above"
    ):
        datasets.load("digits", "data", per_class=1)
    assert len(datasets.load("digits", "data", per_class=1, val_fraction=0).train.labels) == 10
    folder = write_folders(tmp_path, parts=("train", "val", "test"))
    assert len(datasets.load("folder", folder, per_class=1).train.labels) == 2  # what is held out lies beside it


def test_an_empty_class_is_warned_of_only_where_it_is_chosen(monkeypatch, capsys):
    labels = np.array([0, 1, 0, 1])
    images = ArrayImages(np.zeros((4, 4, 4, 1), dtype=np.uint8), labels)
    raw = RawDataset(("a", "b", "c"), {"train": images, "test": images})
    spec = DatasetSpec("", lambda root, reading: raw, (0,), (1,))
    monkeypatch.setitem(DATASETS._entries, "letters", spec)
    datasets.load("letters", "data", classes=2)
    assert capsys.readouterr().err == ""
    datasets.load("letters", "data")
    assert "1 of the 3 classes of letters has no training image, such as 'c'" in capsys.readouterr().err


def test_grey_images_can_be_resized():
    assert datasets.load("digits", "data", image_size=16).train.images.shape[1:] == (16, 16, 1)


def test_other_shapes_are_cropped_to_the_size_asked_for(tmp_path):
    write_folders(tmp_path, size=(12, 9))
    assert datasets.load("folder", tmp_path, image_size=6).train.images.shape[1:3] == (6, 6)


def remove(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def damage_text(root):
    (root / "train" / "bee" / "3.png").write_text("not an image")


def damage_cut(root):
    path = root / "train" / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def damage_empty(root):
    (root / "train" / "bee" / "3.png").write_bytes(b"")


def drop_class(root):
    remove(root / "test" / "bee")


def add_class(root):
    (root / "test" / "bee").rename(root / "test" / "beetle")


def empty_class(root):
    remove(root / "train" / "bee")
    (root / "train" / "bee").mkdir()


def one_class(root):
    remove(root / "train" / "bee")


def other_size(root):
    Image.new("RGB", (9, 9)).save(root / "train" / "bee" / "3.png")


def not_square(root):
    Image.new("RGB", (9, 8)).save(root / "train" / "ant" / "0.png")


def other_size_in_test(root):
    Image.new("RGB", (9, 9)).save(root / "test" / "bee" / "3.png")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (damage_text, r"cannot read the image .*bee/3.png"),
        (damage_cut, r"cannot read the image .*bee/3.png"),
        (damage_empty, r"cannot read the image .*bee/3.png"),
        (drop_class, "holds 1 class folder;"),
        (add_class, "lacks 1 of the class folders, such as 'bee'"),
        (empty_class, "bee holds no images"),
        (one_class, "holds 1 class folder;"),
        (other_size, r"bee/3.png is 9x9 pixels, others are 8x8: set data.image_size"),
        (other_size_in_test, r"test/bee/3.png is 9x9 pixels, others are 8x8: set data.image_size"),
        (not_square, r"ant/0.png is 9x8 pixels: set data.image_size"),
    ],
)
def test_bad_folders_are_named(tmp_path, harm, says):
    harm(write_folders(tmp_path))
    with pytest.raises(InputError, match=says):
        datasets.load("folder", tmp_path)


def test_missing_folders_are_named(tmp_path):
    root = tmp_path / "a" / "set"  # the folders of other tests lie beside that of this one, and may hold images
    root.mkdir(parents=True)
    with pytest.raises(InputError, match=f"no folder {root}/train"):
        datasets.load("folder", root)
    write_folders(root, parts=("train",), count=1)
    with pytest.raises(InputError, match="one training image per class and no val or test part"):
        datasets.load("folder", root)


@pytest.mark.parametrize("content", ["train/ant", "cifar-100-python"])
def test_the_folder_of_a_data_set_in_place_of_the_one_around_it_is_answered_with_that(tmp_path, content):
    root = tmp_path / "my data" / "cifar100"
    root.mkdir(parents=True)
    datasets.check("cifar100", root)  # an empty one may be meant to be filled
    (root / content).mkdir(parents=True)
    with pytest.raises(InputError, match="cifar100 holds cifar100 itself; did you mean --data-root '.*/my data'"):
        datasets.check("cifar100", root)
    datasets.check("cifar10", root)
    (root / "cifar100").mkdir()
    datasets.check("cifar100", root)


def test_asking_for_a_part_that_is_not_there():
    data = datasets.load("digits", "data", val_fraction=0)
    with pytest.raises(InputError, match="no validation part"):
        data.part("val")
