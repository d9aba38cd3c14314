"""Image files of every kind are read correctly, or refused by name."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support import write_folders

from repan_cli.data import datasets, image_files
from repan_cli.data.image_files import ForbiddenImageError
from repan_cli.errors import InputError, OutOfReachError, OutOfSpaceError

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(path, channels=3):
    return np.asarray(image_files.open_image(path, channels))


def test_grey_and_colour(tmp_path):
    grey, colour = saved(tmp_path, Image.fromarray(RAMP), "grey.png"), saved(tmp_path, Image.fromarray(COLOUR))
    assert np.array_equal(pixels(grey), np.repeat(RAMP[..., None], 3, axis=2))
    assert np.array_equal(pixels(grey, 1), RAMP)
    assert np.array_equal(pixels(colour), COLOUR)
    assert pixels(colour, 1).shape == (8, 8)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 256 + 17))
    assert np.array_equal(pixels(path, 1), RAMP)


def test_palettes_and_transparency_are_converted(tmp_path):
    palette = Image.fromarray(COLOUR).quantize(256)
    assert np.array_equal(pixels(saved(tmp_path, palette)), np.asarray(palette.convert("RGB")))
    see_through = np.dstack([COLOUR, RAMP])
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(see_through), "b.png")), COLOUR)
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    assert np.abs(pixels(saved(tmp_path, cmyk, "c.tif")).astype(int) - COLOUR).max() <= 1


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = saved(tmp_path, Image.fromarray(COLOUR), exif=exif)
    assert np.array_equal(pixels(path), COLOUR[::-1, ::-1])


def test_numbers_that_are_no_brightness_are_refused(tmp_path):
    for array, what in ((RAMP.astype(np.float32), "floats"), (RAMP.astype(np.int32), "32-bit integers")):
        path = saved(tmp_path, Image.fromarray(array), "a.tif")
        with pytest.raises(InputError, match=f"cannot read the image .*a.tif: its pixels are {what}"):
            image_files.open_image(path)
        with pytest.raises(InputError):
            image_files.check(path, whole=False)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("L", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(InputError, match="cannot read the image .*a.png: .*decompression bomb"):
        image_files.open_image(path)


def test_a_folder_called_validation_is_the_validation_part(tmp_path):
    for part in ("train", "validation", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(COLOUR).save(tmp_path / part / name / f"{number}.png")
    data = datasets.load("folder", tmp_path)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [6, 6, 6]
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="val and .*validation are the same part"):
        datasets.load("folder", tmp_path)


def test_channels_choose_grey_or_colour(tmp_path):
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(RAMP).save(tmp_path / part / name / f"{number}.png")
    grey = datasets.load("folder", tmp_path, channels=1, val_fraction=0)
    assert (grey.channels, grey.train.images.shape) == (1, (6, 8, 8, 1))
    assert np.array_equal(grey.train.images[0, ..., 0], RAMP)
    coloured = datasets.load("digits", "data", channels=3)
    plain = datasets.load("digits", "data")
    assert coloured.mean == plain.mean * 3
    assert np.array_equal(coloured.train.images, np.repeat(plain.train.images, 3, axis=3))
    again = datasets.load("synthetic", "data", channels=1, image_size=8)
    assert again.train.images.shape[3] == len(again.mean) == 1


def written(tmp_path, name, make):
    """A folder set whose second training image of the class bee is what `make` writes."""
    for part in ("train", "test"):
        for kind in ("ant", "bee"):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(COLOUR).save(tmp_path / part / kind / f"{number}.png")
    (tmp_path / "train" / "bee" / "1.png").unlink()
    path = tmp_path / "train" / "bee" / name
    make(path)
    return path


def numpy_file(path):
    np.save(path.open("wb"), COLOUR)


def cut_short(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-900])


def flipped_inside(path):
    Image.fromarray(COLOUR).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


OUTCOMES = {
    "grey.png": (lambda path: Image.fromarray(RAMP).save(path), "read"),
    "grey.jpg": (lambda path: Image.fromarray(RAMP).save(path), "read"),
    "colour.jpg": (lambda path: Image.fromarray(COLOUR).save(path), "read"),
    "colour.webp": (lambda path: Image.fromarray(COLOUR).save(path), "read"),
    "colour.bmp": (lambda path: Image.fromarray(COLOUR).save(path), "read"),
    "deep.png": (lambda path: Image.fromarray(RAMP.astype(np.uint16) * 256).save(path), "read"),
    "alpha.png": (lambda path: Image.fromarray(np.dstack([COLOUR, RAMP])).save(path), "read"),
    "grey_alpha.png": (lambda path: Image.fromarray(COLOUR).convert("LA").save(path), "read"),
    "palette.png": (lambda path: Image.fromarray(COLOUR).quantize(16).save(path), "read"),
    "one_bit.png": (lambda path: Image.fromarray(COLOUR).convert("1").save(path), "read"),
    "cmyk.tif": (lambda path: Image.fromarray(COLOUR).convert("CMYK").save(path), "read"),
    "cmyk.jpg": (lambda path: Image.fromarray(COLOUR).convert("CMYK").save(path), "read"),
    "float.tif": (lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path), "its pixels are floats"),
    "whole.tif": (lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path), "its pixels are 32-bit integers"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.jpg": (lambda path: path.write_text("a photograph"), "not an image"),
    "array.png": (numpy_file, "not an image"),
    "half.jpg": (cut_short, "truncated|broken"),
    "half.png": (cut_short, "truncated|broken"),
    "flipped.png": (flipped_inside, "broken|CRC|truncated|bad"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_each_of_twenty_kinds_of_files_has_one_outcome(tmp_path, name):
    make, outcome = OUTCOMES[name]
    path = written(tmp_path, name, make)
    if outcome == "read":
        assert len(datasets.load("folder", tmp_path, val_fraction=0).train.labels) == 6
        return
    with pytest.raises(InputError, match=f"cannot read the image {path}: .*({outcome})"):
        datasets.load("folder", tmp_path, image_size=8, val_fraction=0)
    left = datasets.load("folder", tmp_path, image_size=8, val_fraction=0, on_error="skip")
    assert len(left.train.labels) == 5


@pytest.mark.parametrize("size", [(1, 12), (12, 1), (7, 7), (1, 1)])
def test_jpegs_below_8_pixels_are_read(tmp_path, size):
    Image.new("RGB", size, (200, 30, 10)).save(tmp_path / "small.jpg")
    image_files.check(tmp_path / "small.jpg", whole=True)
    assert image_files.open_image(tmp_path / "small.jpg").size == size


@pytest.mark.parametrize("failure", [ZeroDivisionError(), KeyError("tile"), IndexError("\nindex"), OSError("broken")])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, failure):
    def load(image):
        raise failure

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(image_files.UnreadableImageError, match=r"^cannot read the image .*a\.png: \S.*$"):
        image_files.check(tmp_path / "a.png", whole=True)


def of_package(module):
    """An error as a package for the network raises it, which need not be installed."""
    return type("ConnectionError", (Exception,), {"__module__": module})("no route")


@pytest.mark.parametrize(
    ("reason", "kind", "says"),
    [
        (MemoryError(), OutOfSpaceError, "out of memory while reading the image .*a.png: set data.workers=0"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfSpaceError, "out of memory while reading"),
        (OSError("out of memory error when reading image file"), OutOfSpaceError, "out of memory while reading"),
        (OSError(errno.EMFILE, "Too many open files"), OutOfSpaceError, "a.png: Too many open files: .*ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), OutOfSpaceError, "a.png: No space left"),
        (OSError(errno.EIO, "Input/output error"), OutOfReachError, "a.png: Input/output error: its disk or network"),
        (OSError(errno.ESTALE, "Stale file handle"), OutOfReachError, "a.png: Stale file handle: its disk or network"),
        (TimeoutError("timed out"), OutOfReachError, "a.png: timed out: its disk or network"),
        (of_package("requests.exceptions"), OutOfReachError, "a.png: no route: its disk or network"),
        (of_package("httpx2"), OutOfReachError, "a.png: no route: its disk or network"),
        (PermissionError(errno.EACCES, "Permission denied"), ForbiddenImageError, "a.png: Permission denied$"),
    ],
)
@pytest.mark.parametrize("at", ["stat", "open", "load"])
def test_a_failure_that_is_not_the_images_own_is_not_that_of_an_unreadable_image(
    tmp_path, monkeypatch, reason, kind, says, at
):
    def fails(*_, **__):
        raise reason

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    place = {"stat": Path, "open": Image, "load": PngImagePlugin.PngImageFile}[at]
    monkeypatch.setattr(place, at, fails)
    with pytest.raises(kind, match=says):
        image_files.check(tmp_path / "a.png", whole=True)


def test_an_image_without_permission_is_not_left_out_when_a_folder_is_listed(tmp_path, monkeypatch):
    write_folders(tmp_path, size=(8, 8))
    opened = image_files.Image.open

    def fails(path):
        if path.parts[-2:] == ("ant", "2.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path)

    monkeypatch.setattr(image_files.Image, "open", fails)
    with pytest.raises(InputError, match=r"ant/2.png: Permission denied: give yourself the right to read it"):
        datasets.load("folder", tmp_path, image_size=8, on_error="skip")


def test_sizes_are_read_in_order_and_no_further_than_the_first_difference(tmp_path, monkeypatch):
    read = []

    def size_in(path):
        read.append(path.name)
        if path.name == "3":
            raise image_files.UnreadableImageError("damaged")
        return (9, 9) if path.name in ("5", "6") else (8, 8)

    monkeypatch.setattr(image_files, "size_in", size_in)
    paths = [tmp_path / str(number) for number in range(5000)]
    assert "5 is 9x9 pixels, others are 8x8" in image_files.common_side(paths)
    assert len(read) <= 7, "1, 2 and 4 at once"
    assert image_files.common_side([*paths[:5], *paths[7:]]) == 8
    assert image_files.common_side(paths[3:4]) == "no image can be read"


def test_the_names_of_files_are_kept_as_they_are(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "long" / ("ß" * 50 + ".png"), Path(os.fsdecode(b"b\xff.png"))]
    reader = pickle.loads(pickle.dumps(image_files.FileReader(paths, 3)))
    assert [reader.path(number) for number in range(3)] == paths
    assert not [value for value in vars(reader).values() if isinstance(value, (list, tuple))], "shared by processes"
    assert image_files.FileReader([], 3).ends.tolist() == [0]
