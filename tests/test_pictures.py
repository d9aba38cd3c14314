"""Pictures: the first batch of a run, classified images, and letters that no font has."""

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from support import assert_same, card_of, one_line, run, small_net

from repan_cli import checkpoint
from repan_cli.commands import predict
from repan_cli.data.batches import Augmentation, Batch
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.display import pictures, plots
from repan_cli.display.pictures import Captioned
from repan_cli.display.plots import draw_curves  # as it is, before tests leave it undrawn
from repan_cli.session import mosaic, runner

pytestmark = pytest.mark.usefixtures("few_blocks")

RUN = ("--model", "repvgg_a0_cifar", "--dataset", "digits", "--epochs", 1, "data.per_class=20", "run.precision=fp32")
LOOK = {"in_chans": 1, "image_size": 8, "mean": (0.3,), "std": (0.4,), "config": {"data.name": "digits"}}


# ---------------------------------------------------------------------------------------------- the first batch


def test_a_run_shows_its_first_batch_and_is_the_same_to_the_bit(capsys, tmp_path, monkeypatch):
    drawn = []
    draw = mosaic.draw
    monkeypatch.setattr(
        mosaic, "draw", lambda session, folder, batch: (drawn.append(batch), draw(session, folder, batch))
    )
    words = ("train", *RUN, "data.mixup=0.5", "optim.warmup_epochs=0")
    code, _, err = run(capsys, *words, "--out", tmp_path / "a")
    assert code == 0, err
    assert Image.open(tmp_path / "a" / "images.png").format == "PNG"
    monkeypatch.setattr(runner, "_draw_first", lambda *given: None)
    assert run(capsys, *words, "--out", tmp_path / "b")[0] == 0
    assert not (tmp_path / "b" / "images.png").exists()
    assert_same(tmp_path / "a", tmp_path / "b")
    (batch,) = drawn
    assert batch.labels.shape == (len(batch.images), 10)


def test_a_picture_that_cannot_be_drawn_ends_nothing(capsys, tmp_path, monkeypatch):
    def fails(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mosaic, "draw", fails)
    code, _, err = run(capsys, "train", *RUN, "--out", tmp_path / "a")
    assert code == 0
    assert "no images.png" in err


def test_the_pixels_are_those_of_the_images(digits, tmp_path):
    train = InMemoryLoader(
        digits.train, mean=digits.mean, std=digits.std, device=torch.device("cpu"), augmentation=Augmentation(padding=0)
    )
    batch = next(train.batches(4))
    rows = mosaic._pixels(batch.images, train)
    assert [row[1:] for row in rows] == [(8, 8, 1)] * 4
    for row, image in zip(rows, digits.train.images[:4], strict=True):
        assert row[0] == image.tobytes()


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (torch.tensor(1), ("b",)),
        (torch.tensor([0.0, 1.0, 0.0]), ("b",)),
        (torch.tensor([0.3, 0.7, 0.0]), ("0.70 b", "0.30 a")),
    ],
)
def test_labels_are_named_with_their_shares(label, says):
    assert mosaic._caption(label, ("a", "b", "c")) == says


def test_only_the_next_batch_is_shown(digits):
    train = InMemoryLoader(digits.train, mean=digits.mean, std=digits.std, device=torch.device("cpu"))
    seen: list[Batch] = []
    train.first = seen.append
    found = [batch for _, batch in zip(range(3), train.training_batches(16, 0, 0, 1), strict=False)]
    assert len(seen) == 1
    assert seen[0] is found[0]
    assert train.first is None


# ---------------------------------------------------------------------------------------------- captions


def test_small_pictures_grow_in_whole_pixels_and_large_ones_shrink():
    assert pictures.resized(Image.new("L", (8, 4)), 100).size == (96, 48)
    assert pictures.resized(Image.new("RGB", (400, 200)), 100).size == (100, 50)
    assert pictures.resized(Image.new("L", (1000, 1)), 100).size == (100, 1)


def test_long_names_are_cut_and_control_characters_spelled_out():
    text, font = pictures.fitted("a very long name of a class, which has no end", 80, 11)
    assert text.endswith("...")
    assert font.getlength(text) <= 80
    assert pictures.fitted("\x1b[2J", 200, 11)[0] == r"\x1b[2J"


def test_a_mosaic_has_room_for_all():
    tiles = [Captioned(Image.new("RGB", (32, 32)), ("a",)), *[Captioned(Image.new("L", (8, 8)), ("b", "c"))] * 9]
    whole = pictures.mosaic(tiles, title="t")
    assert whole.width > 8 * 96
    assert whole.height > 2 * 96


# ---------------------------------------------------------------------------------------------- repan predict --save


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_net(in_chans=1)
    checkpoint.save(checkpoint.capture(model, card_of(model, **LOOK)), tmp_path / "net.pt")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("one.png", "more/One.jpg", "more/two.png"):
        Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_pictures_are_written_with_their_classes(capsys, saved):
    code, out, err = run(capsys, "predict", "net.pt", "photos", "--save", "seen", "--json")
    assert code == 2, "one cannot be read"
    assert "broken.png" in err
    rows = json.loads(out)
    assert sorted(path.name for path in (saved / "seen").iterdir()) == [
        "One.png",
        "one_1.png",
        "predictions.csv",
        "two.png",
    ]
    with (saved / "seen" / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table] == [row["image"] for row in rows]
    assert [row["class"] for row in table] == [row["classes"][0]["class"] for row in rows]
    picture = Image.open(saved / "seen" / "two.png")
    assert picture.width == 360, "in whole pixels"
    assert picture.height > 270, "with room for the classes"


def test_many_images_of_one_name_get_names_at_once(tmp_path):
    """Names were tried from the first on for every image, which took minutes for some ten thousand."""
    files = [Path("photos", str(number), "Image.jpg") for number in range(20_000)]
    targets = predict._targets(tmp_path / "seen", [*files, Path("image_1.jpg"), Path("b.jpg")])
    assert len({str(target).lower() for target in targets.values()}) == 20_002
    names = [target.name for target in targets.values()]
    assert (names[:3], names[-2:]) == (["Image.png", "Image_1.png", "Image_2.png"], ["image_1_1.png", "b.png"])


def test_images_are_decoded_side_by_side(capsys, saved, monkeypatch):
    opened = predict.open_image
    threads = set()

    def noted(file, channels):
        threads.add(threading.current_thread().name)
        return opened(file, channels)

    monkeypatch.setattr(predict, "open_image", noted)
    assert run(capsys, "predict", "net.pt", "photos")[0] == 2, "one cannot be read"
    assert "MainThread" not in threads


def test_nothing_is_overwritten(capsys, saved):
    (saved / "seen").mkdir()
    (saved / "seen" / "two.png").write_bytes(b"mine")
    assert "two.png already exists: give another --save" in one_line(
        capsys, "predict", "net.pt", "photos", "--save", "seen"
    )
    assert (saved / "seen" / "two.png").read_bytes() == b"mine"
    assert "cannot create the folder" in one_line(capsys, "predict", "net.pt", "photos", "--save", "net.pt/seen")


# ---------------------------------------------------------------------------------------------- Matplotlib's

RECORDS = [
    {
        "cycle": n // 2,
        "train_top1": 50.0,
        "val_top1": 60.0 + n,
        "loss": 1.0,
        "val_loss": 1.0,
        "lr": 0.1,
        "attach_rate": 1.0,
    }
    for n in range(4)
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")
    found = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *given, **how: found.append(self))
    return found


def test_one_epoch_is_marked_as_one(drawn, tmp_path):
    draw_curves(RECORDS[:1], tmp_path / "a.png", title="run")
    assert list(drawn[0].axes[-1].get_xticks()) == [1]


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, []),
        ({"lr": (0.1, 0.2, 0.3, 0.4)}, ["learning rate"]),
        ({"attach_rate": (0, 0.5, 1, 1)}, ["attach rate (dashed)"]),
        ({"lr": (1, 2, 3, 4), "attach_rate": (0, 0, 0, 1)}, ["learning rate", "attach rate (dashed)"]),
    ],
)
def test_rates_that_are_constant_are_not_drawn(drawn, tmp_path, changes, labels):
    records = [{**record, **{key: values[n] for key, values in changes.items()}} for n, record in enumerate(RECORDS)]
    draw_curves(records, tmp_path / "a.png", title="run", tests={0: 55.0, 1: 58.0, 2: 1.0})
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes] == ["top-1, %", "loss", *labels]
    marks = next(line for line in figure.axes[0].lines if line.get_marker() == "D")
    assert list(marks.get_xdata()) == [2, 4], "the last epochs of both phases"
    assert list(marks.get_ydata()) == [55.0, 58.0]


def test_the_confusion_has_a_title_and_names_as_they_are(drawn, tmp_path):
    lacking = plots.draw_confusion(
        [[3, 1], [0, 2]], ["größe $x$", "\x1b[2J"], tmp_path / "a.png", title="net on $5$ images"
    )
    (figure,) = drawn
    assert lacking == []
    assert figure.get_suptitle() == "net on $5$ images"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["größe $x$", r"\x1b[2J"]


def test_letters_that_no_font_has_are_reported(drawn, tmp_path, monkeypatch):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert plots.draw_confusion([[1]], ["ä\U00013000"], tmp_path / "a.png") == ["\U00013000"]
    monkeypatch.setattr(pictures, "_fonts", lambda size: (ImageFont.load_default(size),))
    assert pictures.lacking(["a\U00013000", "b"]) == ["\U00013000"]


def test_the_run_marks_what_it_has_tested(tmp_path):
    from repan_cli.session.summary import _tests

    summary = {"baseline": {"test_top1": 50.0}, "cycles": [{"cycle": 1, "test_top1": 60.0}]}
    assert _tests(summary) == {0: 50.0, 1: 60.0}
    assert _tests({"baseline": None, "cycles": []}) == {}
