"""Detailed scores: every figure equals one computed by hand."""

import csv
import json

import pytest
import timm
import torch
from support import CPU, one_line, run, write_folders
from torch import nn

from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages
from repan_cli.system.packages import missing
from repan_cli.training import scoring
from repan_cli.training.evaluation import evaluate


class Told(nn.Module):
    """Gives the logits that stand for each image, whose number is its only pixel."""

    def __init__(self, logits, most=10**9):
        super().__init__()
        self.logits, self.most, self.asked = logits, most, []

    def forward(self, images):
        self.asked.append(len(images))
        if len(images) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def source(labels):
    numbers = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).numpy()
    return InMemoryLoader(ArrayImages(numbers, torch.tensor(labels).numpy()), mean=(0.0,), std=(1.0,), device=CPU)


def sure(classes, chosen, confidence):
    """Logits whose softmax gives `confidence` to one class and the rest alike to the others."""
    rest = (1 - confidence) / (classes - 1)
    return torch.tensor([confidence if number == chosen else rest for number in range(classes)]).log()


def test_figures_worked_out_by_hand():
    """Four images at 0.9 of which three are right, two at 0.5 of which none is: |0.9 - 0.75| * 4/6 + 0.5 * 2/6."""
    labels = [0, 0, 1, 1, 2, 2]
    told = [(0, 0.9), (0, 0.9), (1, 0.9), (0, 0.9), (0, 0.5), (1, 0.5)]
    logits = torch.stack([sure(3, chosen, confidence) for chosen, confidence in told])
    details, _ = scoring.examine(Told(logits), source(labels), 3)
    assert details.calibration_error == pytest.approx(100 * (0.15 * 4 + 0.5 * 2) / 6, abs=1e-4)
    assert details.confusion().tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert details.class_accuracy() == [100, 50, 0]
    assert details.score.top1 == pytest.approx(50)
    assert list(scoring.worst_confusions(details, 2)) == [(1, 0, 1), (2, 0, 1)]
    assert details.score == evaluate(Told(logits), source(labels))


def test_a_class_without_images_has_no_accuracy():
    details, _ = scoring.examine(Told(torch.eye(3)), source([0, 1]), 3)
    assert details.class_accuracy() == [100, 100, None]


def test_agreement():
    first, _ = scoring.examine(Told(torch.eye(4)), source([0, 1, 2, 3]), 4)
    other, _ = scoring.examine(Told(torch.eye(4)[[0, 1, 3, 2]]), source([0, 1, 2, 3]), 4)
    assert scoring.agreement(first, other) == 50


def test_batches_are_halved_until_memory_suffices():
    labels = [number % 5 for number in range(200)]
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    whole, size = scoring.examine(Told(logits), source(labels), 5)
    assert size == 1000
    tight = Told(logits, most=100)
    details, size = scoring.examine(tight, source(labels), 5)
    assert size == 62
    assert tight.asked[:5] == [200, 200, 200, 125, 62]
    assert details.score.top1 == whole.score.top1
    assert details.confusion().equal(whole.confusion())
    with pytest.raises(RuntimeError, match="can't allocate"):
        scoring.examine(Told(logits, most=0), source(labels), 5)


def test_tables_and_both_forms(capsys, few_blocks, small_run, tmp_path):
    words = ["evaluate", small_run.folder / "best.pt", "--fused", "--out", tmp_path / "tables", "--json"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    found = json.loads(out)
    assert (found["form"], found["compared"]["form"], found["agreement"]) == ("fused", "multi-branch", 100)
    assert found["loss"] == pytest.approx(found["compared"]["loss"], rel=1e-5)
    rows = list(csv.reader((tmp_path / "tables" / "confusion.csv").open()))
    counts = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    assert sum(map(sum, counts)) == found["images"]
    right = sum(counts[number][number] for number in range(10))
    assert 100 * right / found["images"] == pytest.approx(found["top1"])
    classes = list(csv.DictReader((tmp_path / "tables" / "classes.csv").open()))
    assert {row["class"]: float(row["top1"]) for row in classes} == pytest.approx(found["class_top1"])
    assert (tmp_path / "tables" / "confusion.png").exists() or missing("matplotlib")


def test_a_new_evaluation_replaces_the_tables_and_the_picture_of_an_earlier_one(
    capsys, few_blocks, small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("repan_cli.display.plots.available", lambda: False)
    (tmp_path / "confusion.png").write_bytes(b"of another network")
    (tmp_path / "mine.txt").write_text("mine")
    words = ["evaluate", small_run.folder / "fused.pt", "--out", tmp_path]
    err = run(capsys, *words)[2]
    assert f"replacing confusion.png of an earlier evaluation in {tmp_path}" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.csv", "confusion.csv", "mine.txt"]
    assert "replacing confusion.csv, classes.csv of an earlier evaluation" in run(capsys, *words)[2]


def test_tables_that_cannot_be_written_are_told_before_anything_is_scored(capsys, few_blocks, small_run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/tables"):
        assert "--out" in one_line(capsys, "evaluate", small_run.folder / "best.pt", "--out", out)


def test_weights_of_others_on_ones_own_images(capsys, small_timm, tmp_path):
    """A timm network's file, named, on image folders of as many classes."""
    model = timm.create_model("repvgg_a0", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    folders = write_folders(tmp_path / "photos")
    words = ["evaluate", tmp_path / "theirs.pth", "--model", "repvgg_a0", "-d", "folder", "--data-root", folders]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["form"] == "multi-branch"


def test_a_hundred_thousand_classes_take_no_table_of_pairs(tmp_path):
    """Ten thousand million counts would be 80 GB."""
    from repan_cli.commands import evaluate as command

    many = 100_000
    logits = torch.zeros(3, many)
    logits[0, 5] = logits[1, 7] = logits[2, 99_999] = 9
    details, _ = scoring.examine(Told(logits), source([5, 5, 99_999]), many)
    assert list(scoring.worst_confusions(details, 9)) == [(5, 7, 1)]
    assert details.class_accuracy()[5] == 50
    assert details.class_images()[99_999] == 1
    written = command._write(tmp_path, details, tuple(map(str, range(many))), "a network")
    assert [path.rpartition("/")[2] for path in written] == ["confusion.csv", "classes.csv"]
    rows = (tmp_path / "confusion.csv").read_text().splitlines()
    assert rows == ["true,predicted,images", "5,5,1", "5,7,1", "99999,99999,1"]
