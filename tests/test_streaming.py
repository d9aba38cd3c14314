"""Images read one by one: the right pixels, drawn from position alone, whichever process loads them."""

import errno
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import CPU, MEAN, STD, by_hand, write_folders
from torchvision import transforms

from repan_cli import config
from repan_cli.data import build, builtin, datasets, image_files
from repan_cli.data.batches import Augmentation
from repan_cli.data.image_files import ForbiddenImageError
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.streaming import StreamingLoader
from repan_cli.data.types import ArrayImages, LazyImages
from repan_cli.errors import InputError, OutOfReachError, OutOfSpaceError
from repan_cli.system.device import Runtime

FP32 = Runtime(CPU, "fp32")


def noise(count=40, size=8, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return ArrayImages(images, np.arange(count, dtype=np.int64) % 5)


def streamed(
    part=None, *, resized=False, workers=0, size=8, classes=5, skip=False, policy_of="cifar10", **augmentation
):
    look = {"mean": MEAN, "std": STD, "device": CPU, "size": size, "classes": classes}
    augmentation = Augmentation(**augmentation)
    kinds = {"resized": resized, "workers": workers, "skip": skip, "policy_of": policy_of}
    return StreamingLoader(part or noise(), augmentation=augmentation, **kinds, **look)


def epoch(source, batch_size=16, position=(0, 1, 1), **options):
    return list(source.training_batches(batch_size, *position, **options))


def test_every_view_is_that_of_the_picture_pipeline_to_1e_6():
    """All 162 crops and flips of 32x32 images, by tensor operations on the device and by Pillow."""
    part = noise(4, 32)
    resident = InMemoryLoader(part, mean=MEAN, std=STD, device=CPU, augmentation=Augmentation(padding=4, flip=True))
    normalise = transforms.Normalize(MEAN, STD)
    assert resident.view_count == 162
    for view in range(162):
        row, column, flip = view // 2 // 9, view // 2 % 9, view % 2
        found = resident.batch(torch.arange(4), torch.full((4,), view)).images
        for image, pixels in zip(found, part.images, strict=True):
            padded = transforms.functional.pad(Image.fromarray(pixels), 4)
            picture = transforms.functional.crop(padded, row, column, 32, 32)
            picture = transforms.functional.hflip(picture) if flip else picture
            expected = normalise(transforms.functional.to_tensor(picture))
            assert (image - expected).abs().max() < 1e-6


@pytest.mark.parametrize("resized", [False, True])
def test_an_epoch_depends_neither_on_workers_nor_on_what_ran_before(resized):
    options = {"padding": 1, "flip": True, "policy": "trivialaugment", "resized": resized}
    torch.manual_seed(1)
    first = epoch(streamed(**options))
    torch.manual_seed(2)
    np.random.seed(3)
    for again in (epoch(streamed(**options)), epoch(streamed(workers=2, **options))):
        for a, b in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    other = epoch(streamed(**options), position=(0, 1, 2))
    assert not torch.equal(first[0].images, other[0].images)
    assert sorted(torch.cat([batch.index for batch in first]).tolist()) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_generators_of_the_process_as_they_are(workers):
    """Dropout and users' blocks in a restart drew other numbers with data.workers=0, which changes no result."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    epoch(streamed(workers=workers, policy="trivialaugment"))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.4, "cutmix": 1.0}, {"erase": 0.5, "cutout": 3}])
@pytest.mark.parametrize("kind", ["streamed", "resident"])
def test_an_epoch_can_be_entered_at_any_batch(kind, mix):
    if kind == "streamed":
        source = streamed(padding=1, flip=True, policy="randaugment", **mix)
    else:
        augmentation = Augmentation(padding=1, flip=True, **mix)
        source = InMemoryLoader(noise(), mean=MEAN, std=STD, device=CPU, augmentation=augmentation, classes=5)
    whole = epoch(source)
    for first in range(4):
        rest = epoch(source, first=first)
        assert len(rest) == len(whole) - first
        for a, b in zip(whole[first:], rest, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_without_augmentation_pictures_are_the_images_themselves():
    part = noise()
    plain = next(streamed(part).batches(40))
    expected = torch.stack([by_hand(image, 0, 0) for image in part.images])
    torch.testing.assert_close(plain.images.double(), expected, rtol=0, atol=1e-5)
    assert plain.labels.tolist() == part.labels.tolist()


@pytest.mark.parametrize("policy_of", ["cifar10", "svhn", "imagenet"])
@pytest.mark.parametrize("policy", config.POLICIES)
def test_policies_change_images_each_in_its_own_way(policy, policy_of):
    part = noise(300, 32)
    part.images[1:] = part.images[0]
    batch = epoch(streamed(part, size=32, policy=policy, policy_of=policy_of), batch_size=300)[0]
    kinds = {image.numpy().tobytes() for image in batch.images}
    assert len(kinds) > 60, "one image, 300 samples"


def test_grey_images_take_policies():
    part = noise(8, 16, channels=1)
    source = StreamingLoader(
        part, resized=False, mean=(0.5,), std=(0.2,), size=16, device=CPU,
        augmentation=Augmentation(policy="trivialaugment"), policy_of="svhn",
    )  # fmt: skip
    assert epoch(source)[0].images.shape == (8, 1, 16, 16)


def test_resized_crops_show_a_part_of_each_image():
    half = np.zeros((16, 32, 32, 3), dtype=np.uint8)
    half[:, :16] = 255
    source = streamed(ArrayImages(half, np.zeros(16, dtype=np.int64)), resized=True, size=16, least_area=0.08)
    means = epoch(source)[0].images.mean((1, 2, 3))
    assert means.std() > 0.1
    assert source.unnumbered == "data.crop=resized"
    assert next(source.batches(4)).images.shape == (4, 3, 16, 16)


# ---------------------------------------------------------------------------------------------- whole batches


def test_mixing_shares_labels_as_it_shares_pixels():
    images = np.zeros((64, 8, 8, 3), dtype=np.uint8)
    images[:32] = 255
    part = ArrayImages(images, np.repeat([0, 1], 32))
    for mix in ({"mixup": 1.0}, {"cutmix": 1.0}):
        source = InMemoryLoader(
            part, mean=(0,) * 3, std=(1,) * 3, device=CPU, augmentation=Augmentation(**mix), classes=2
        )
        batch = epoch(source, batch_size=64)[0]
        assert batch.labels.shape == (64, 2)
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(64))
        torch.testing.assert_close(batch.images.mean((1, 2, 3)), batch.labels[:, 0], rtol=0, atol=1e-5)
        assert ((batch.labels > 0).sum(1) == 2).any()
        assert batch.classes().shape == (64,)


def test_erasing_blanks_one_rectangle_in_a_share_of_the_images():
    images = np.full((400, 24, 24, 3), 255, dtype=np.uint8)
    part = ArrayImages(images, np.zeros(400, dtype=np.int64))
    source = InMemoryLoader(part, mean=(0,) * 3, std=(1,) * 3, device=CPU, augmentation=Augmentation(erase=0.4))
    blank = epoch(source, batch_size=400)[0].images[:, 0] == 0
    areas = blank.sum((1, 2)) / 24**2
    assert 0.33 < (areas > 0).float().mean() < 0.47
    assert areas[areas > 0].min() > 0.01
    assert areas.max() < 0.36
    for image in blank[areas > 0]:
        rows, columns = image.any(1).sum(), image.any(0).sum()
        assert rows * columns == image.sum(), "a rectangle"


# ---------------------------------------------------------------------------------------------- reading


def folder(tmp_path, **options):
    data = datasets.load("folder", write_folders(tmp_path, size=(40, 30)), image_size=16, crop="resized", **options)
    return data, config.build({"data.workers": "0", "data.name": "folder"}).data


def test_large_folders_are_read_one_by_one(tmp_path):
    data, settings = folder(tmp_path)
    source = build.train_loader(data, settings, FP32)
    assert isinstance(source, StreamingLoader)
    assert epoch(source, batch_size=4)[0].images.shape == (4, 3, 16, 16)
    test = build.eval_loader(data, "test", FP32, 0)
    assert torch.cat([batch.labels for batch in test.batches(5)]).tolist() == [0] * 6 + [1] * 6
    assert (data.image_size, len(data.val.labels)) == (16, 2)


def test_images_above_64_pixels_are_read_one_by_one(tmp_path):
    write_folders(tmp_path, size=(70, 70))
    assert isinstance(datasets.load("folder", tmp_path).train, LazyImages)
    assert isinstance(datasets.load("folder", tmp_path, image_size=64).train, ArrayImages)
    assert isinstance(datasets.load("folder", tmp_path, crop="pad").train, ArrayImages)


def cut(path):
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_stops_the_run_or_is_left_out(tmp_path, workers, capsys):
    data, _ = folder(tmp_path, val_fraction=0)
    cut(tmp_path / "train" / "bee" / "3.png")
    stopping = build.train_loader(data, config.build({"data.workers": str(workers)}).data, FP32)
    with pytest.raises(InputError, match=r"cannot read the image .*bee/3.png: .*; data.on_error=skip skips"):
        epoch(stopping, batch_size=4)
    skipping = config.build({"data.workers": str(workers), "data.on_error": "skip"}).data
    source = build.train_loader(data, skipping, FP32)
    for position in ((0, 0, 1), (0, 0, 2)):
        batches = epoch(source, batch_size=4, position=position)
        assert [len(batch.labels) for batch in batches] == [4, 4, 4], "another image in its place"
    assert capsys.readouterr().err.count("left out of training (1 so far)") == 1
    cut(tmp_path / "test" / "ant" / "1.png")
    with pytest.raises(InputError, match="test/ant/1.png"):
        datasets.load("folder", tmp_path, image_size=16, crop="resized", on_error="skip")
    with pytest.raises(InputError, match=r"test/ant/1.png: [^;]*$"):
        list(build.eval_loader(data, "test", FP32, workers).batches(4))


REASONS = {
    "memory": (MemoryError(), OutOfSpaceError, "out of memory while reading the image .*[.]png"),
    "files": (OSError(errno.EMFILE, "Too many open files"), OutOfSpaceError, "Too many open files: .*ulimit"),
    "network": (OSError(errno.ESTALE, "Stale file handle"), OutOfReachError, "Stale file handle: its disk"),
    "rights": (PermissionError(errno.EACCES, "Permission denied"), ForbiddenImageError, "Permission denied$"),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in REASONS), ("memory", 1)])
def test_no_image_is_skipped_for_a_reason_that_is_not_its_own(tmp_path, monkeypatch, name, workers):
    reason, kind, says = REASONS[name]
    data, _ = folder(tmp_path, val_fraction=0)
    opened = image_files.Image.open

    def fails(path):
        if path.name == "3.png":
            raise reason
        return opened(path)

    monkeypatch.setattr(image_files.Image, "open", fails)
    skipping = config.build({"data.workers": str(workers), "data.on_error": "skip"}).data
    with pytest.raises(kind, match=says):
        epoch(build.train_loader(data, skipping, FP32), batch_size=4)


def test_a_folder_that_is_gone_ends_a_run_that_skips_images(tmp_path):
    data, _ = folder(tmp_path, val_fraction=0)
    shutil.rmtree(tmp_path / "train" / "bee")
    loader = build.train_loader(data, config.build({"data.workers": "0", "data.on_error": "skip"}).data, FP32)
    with pytest.raises(OutOfReachError, match="the folder .*bee is not there any more"):
        epoch(loader, batch_size=4)


def test_unreadable_headers_are_found_before_the_first_step(tmp_path, capsys):
    write_folders(tmp_path, size=(40, 30))
    (tmp_path / "train" / "bee" / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="bee/3.png: it is empty"):
        datasets.load("folder", tmp_path, image_size=16, crop="resized")
    for crop in ("resized", "pad"):
        data = datasets.load("folder", tmp_path, image_size=16, crop=crop, on_error="skip", val_fraction=0)
        assert len(data.train.labels) == 11
        assert "1 of 12 images of the training folder cannot be read and is left out" in capsys.readouterr().err
    (tmp_path / "test" / "bee" / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match="test/bee/3.png"):
        datasets.load("folder", tmp_path, image_size=16, crop="resized", on_error="skip")


def test_imagenet_is_all_of_its_classes(tmp_path, monkeypatch):
    write_folders(tmp_path / "imagenet", parts=("train", "val"), size=(40, 30))
    with pytest.raises(InputError, match="holds 2 of ImageNet's 1000 classes: is the download incomplete"):
        datasets.load("imagenet", tmp_path)
    monkeypatch.setattr(builtin, "IMAGENET_CLASSES", 2)
    data = datasets.load("imagenet", tmp_path)
    assert (data.image_size, data.classes) == (224, ("ant", "bee"))
    (tmp_path / "imagenet" / "val" / "loose.jpg").write_bytes(b"x")
    for name in ("ant", "bee"):
        for file in (tmp_path / "imagenet" / "val" / name).iterdir():
            file.unlink()
        (tmp_path / "imagenet" / "val" / name).rmdir()
    with pytest.raises(InputError, match="holds 0 class folders.*loose.jpg and the others must be in one folder"):
        datasets.load("imagenet", tmp_path)


def test_timm_names_are_passed_through(tmp_path):
    write_folders(tmp_path, parts=("train", "validation"), size=(40, 30))
    data = datasets.load("torch/image_folder", tmp_path, image_size=16)
    assert (data.classes, data.image_size) == (("ant", "bee"), 16)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [10, 2, 12]
    batch = next(build.eval_loader(data, "test", FP32, 0).batches(12))
    assert batch.images.shape == (12, 3, 16, 16)
    with pytest.raises(InputError, match="wds/x can only be read in order"):
        datasets.load("wds/x", tmp_path)
    with pytest.raises(InputError, match="timm cannot open torch/nonsense"):
        datasets.load("torch/nonsense", tmp_path)
    with pytest.raises(InputError, match="unknown data set 'cifar11'; did you mean cifar10"):
        datasets.load("cifar11", tmp_path)


def test_synthetic_data_have_the_shape_asked_for(capsys):
    data = datasets.load("synthetic", "data", image_size=16, classes=7)
    assert (len(data.classes), data.image_size, data.channels) == (7, 16, 3)
    assert "accuracy on it is meaningless" in capsys.readouterr().err
    assert isinstance(datasets.load("synthetic", "data", image_size=80).train, LazyImages)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy_of", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_works_on_gray_and_on_color(channels, policy_of):
    kinds = {"mean": (0.5,) * channels, "std": (0.2,) * channels, "device": CPU, "size": 8}
    loader = StreamingLoader(
        noise(120, channels=channels),
        resized=False,
        policy_of=policy_of,
        augmentation=Augmentation(policy="autoaugment"),
        **kinds,
    )
    assert sum(len(batch.labels) for batch in epoch(loader, 60)) == 120


@pytest.mark.parametrize("size", [(30, 30), (40, 30), (48, 32), (30, 40)])
def test_images_that_are_not_augmented_are_those_that_are_scored(tmp_path, size):
    """A random crop of the whole area would squash an image that is not square."""
    write_folders(tmp_path, size=size)
    for name in ("ant", "bee"):
        shutil.rmtree(tmp_path / "test" / name)
        shutil.copytree(tmp_path / "train" / name, tmp_path / "test" / name)
    data = datasets.load("folder", tmp_path, image_size=16, crop="resized", val_fraction=0)
    loader = build.train_loader(data, config.build({"data.augment": "none", "data.workers": "0"}).data, FP32)
    scored = torch.cat([batch.images for batch in build.eval_loader(data, "test", FP32, 0).batches(5)])
    for batch in epoch(loader, 5):
        assert torch.equal(batch.images, scored[batch.index])
    assert loader.unnumbered is None
