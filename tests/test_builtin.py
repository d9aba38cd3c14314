"""Built-in data sets are read from small files in the format that their makers publish."""

import gzip
import hashlib
import os
import pickle

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from repan_cli.data import datasets
from repan_cli.errors import InputError

DRAW = np.random.default_rng(0)


def pixels(*shape):
    return DRAW.integers(0, 256, shape, dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- writing the formats


def write_cifar10(root, patch):
    """Pickled batches of rows of 3,072 numbers, red then green then blue."""
    kind = torchvision.datasets.CIFAR10
    folder = root / "cifar10" / kind.base_folder
    folder.mkdir(parents=True)
    images = pixels(12, 3, 32, 32)

    def batch(name, start, stop):
        content = {"data": images[start:stop].reshape(-1, 3072), "labels": [n % 10 for n in range(start, stop)]}
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    patch.setattr(kind, "train_list", [batch(f"data_batch_{n}", 2 * n - 2, 2 * n) for n in range(1, 6)])
    patch.setattr(kind, "test_list", [batch("test_batch", 10, 12)])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    patch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")})
    return images.transpose(0, 2, 3, 1), 10


def write_idx(name):
    def write(root, patch):
        """idx files: a header of big-endian numbers, then bytes; the downloads are gzipped."""
        folder = root / name.lower() / name / "raw"
        folder.mkdir(parents=True)
        images, labels = pixels(30, 28, 28), np.arange(30, dtype=np.uint8) % 10
        for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
            for kind, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
                path = folder / f"{part}-{kind}-ubyte"
                path.write_bytes(header + array.tobytes())
                (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        return images[..., None], 20

    return write


def write_svhn(root, patch):
    """MATLAB files: X of (32, 32, 3, N), y with 10 for the digit 0."""
    folder = root / "svhn"
    folder.mkdir(parents=True)
    images, splits = pixels(30, 32, 32, 3), {}
    for part, rows in (("train", range(20)), ("test", range(20, 30))):
        path = folder / f"{part}_32x32.mat"
        labels = np.array([[n % 10 or 10] for n in rows], dtype=np.uint8)
        scipy.io.savemat(path, {"X": images[rows.start : rows.stop].transpose(1, 2, 3, 0), "y": labels})
        splits[part] = ["", path.name, md5(path)]
    patch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    return images, 20


def write_imagenet16(root, patch):
    """Ten pickled batches of rows of 768 numbers, labels from 1, and one for validation."""
    folder = root / "imagenet16"
    folder.mkdir(parents=True)
    images = pixels(22, 3, 16, 16)
    for number in range(11):
        rows = slice(2 * number, 2 * number + 2)
        content = {"data": images[rows].reshape(-1, 768), "labels": [n % 10 + 1 for n in range(rows.start, rows.stop)]}
        name = "val_data" if number == 10 else f"train_data_batch_{number + 1}"
        (folder / name).write_bytes(pickle.dumps(content))
    return images.transpose(0, 2, 3, 1), 20


FORMATS = {
    "cifar10": write_cifar10,
    "mnist": write_idx("MNIST"),
    "fashionmnist": write_idx("FashionMNIST"),
    "svhn": write_svhn,
    "imagenet16": write_imagenet16,
    "imagenet16_120": write_imagenet16,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_is_read_from_its_own_files(tmp_path, monkeypatch, name):
    images, first_test = FORMATS[name](tmp_path, monkeypatch)
    data = datasets.load(name, tmp_path, val_fraction=0)
    assert np.array_equal(data.train.images, images[:first_test])
    assert np.array_equal(data.test.images, images[first_test:])
    labels = np.arange(len(images)) % 10
    assert np.array_equal(data.train.labels, labels[:first_test])
    assert np.array_equal(data.test.labels, labels[first_test:])
    assert data.train.labels.dtype == np.int64
    assert len(data.mean) == len(data.std) == data.channels == images.shape[-1]
    assert data.flip == (name not in ("mnist", "svhn"))
    assert len(data.classes) == {"imagenet16": 1000, "imagenet16_120": 120}.get(name, 10)


def test_the_first_classes_of_imagenet16_are_kept(tmp_path, monkeypatch):
    folder = tmp_path / "imagenet16"
    write_imagenet16(tmp_path, monkeypatch)
    content = {"data": pixels(3, 768), "labels": [1, 121, 120]}
    (folder / "val_data").write_bytes(pickle.dumps(content))
    data = datasets.load("imagenet16_120", tmp_path, val_fraction=0)
    assert data.test.labels.tolist() == [0, 119]
    assert np.array_equal(data.test.images[1].transpose(2, 0, 1).ravel(), content["data"][2])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps(Evil()), "a call of 'posix.mkdir', .* refused, no code was run"),
        (b"nonsense", "is damaged, or not a pickled batch"),
        (pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [1, 1]}), "holds no images of 16x16 pixels"),
        (pickle.dumps({"data": np.zeros((2, 768), np.uint8), "labels": [1]}), "holds 2 images and 1 labels"),
        (pickle.dumps({"data": np.zeros((2, 768), np.uint8), "labels": [0, 1]}), "must be 1 to 1000"),
        (None, "imagenet16 is not downloaded"),
    ],
    ids=["hostile", "nonsense", "size", "count", "range", "missing"],
)
def test_bad_batches_are_named(tmp_path, monkeypatch, content, says):
    write_imagenet16(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "imagenet16" / "train_data_batch_3"
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(InputError, match=says) as error:
        datasets.load("imagenet16", tmp_path)
    assert "train_data_batch_3" in str(error.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=f"{name} is not under .* and cannot be downloaded"):
        datasets.load(name, tmp_path / "data")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class OfTimm:
    """A data set as timm returns it, with these labels."""

    classes = ("ant", "bee")

    def __init__(self, targets):
        self.targets = targets

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8)), self.targets[index]


@pytest.mark.parametrize("validation", [[0, 1], [-1, -1]])
def test_a_test_part_without_labels_is_not_used(tmp_path, monkeypatch, caplog, validation):
    """That of ImageNet on the Hub has -1 for each image."""
    parts = {"train": [0, 1] * 5, "validation": validation, "test": [-1] * 4}
    monkeypatch.setattr("timm.data.create_dataset", lambda name, *, split, **_: OfTimm(parts[split]))
    if validation == [0, 1]:
        found = datasets.load("hfds/someone/insects", tmp_path, val_fraction=0.2)
        assert (len(found.train.labels), len(found.val.labels), len(found.test.labels)) == (8, 2, 2)
        assert "the test part of hfds/someone/insects has no labels and is not used" in caplog.text
    else:
        with pytest.raises(InputError, match="hfds/someone/insects has no validation or test part with labels"):
            datasets.load("hfds/someone/insects", tmp_path)
