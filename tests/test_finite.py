"""NaN and infinity: networks that hold or return them are refused, and no JSON contains them."""

import json
import math
import re

import pytest
from support import ROOT, card_of, run, small_net, write_folders

from repan_cli import checkpoint
from repan_cli.system.files import to_json

NAN, INFINITE = math.nan, math.inf


@pytest.fixture
def broken(tmp_path, few_blocks):
    """A checkpoint with one weight that is not finite."""

    def make(value=NAN, name="head.weight"):
        saved = checkpoint.capture(model := small_net(in_chans=1), card_of(model, **OF_DIGITS))
        saved.weights[name].view(-1)[0] = value
        checkpoint.save(saved, tmp_path / "a.pt")
        return tmp_path / "a.pt"

    return make


OF_DIGITS = {"in_chans": 1, "image_size": 8, "mean": (0.3,), "std": (0.4,), "config": {"data.name": "digits"}}


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("command", ["evaluate", "predict", "fuse", "quantize", "cycle", "distill"])
def test_weights_that_are_not_finite_are_refused(capsys, tmp_path, broken, command, value):
    path, images = broken(value), write_folders(tmp_path / "images", size=(8, 8))
    train = ("--model", "repvgg_a0_cifar", "--dataset", "digits", "--out", tmp_path / "run")
    words = {
        "predict": (path, images),
        "cycle": (*train, "--init", path),
        "distill": (*train, "--teacher", path),
    }
    code, _, err = run(capsys, command, *words.get(command, (path,)))
    assert code == 2, err
    assert "'head.weight' holds values that are not finite" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_info_names_them(capsys, broken):
    path = broken()
    assert json.loads(run(capsys, "info", path, "--json")[1])["not finite"] == ["head.weight"]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_logits_that_are_not_finite_are_refused(capsys, tmp_path, broken, command):
    """Finite weights, whose products are beyond float32."""
    path = broken(3e38)
    saved = checkpoint.load(path)
    for name, value in saved.weights.items():
        if name.endswith("trunk.conv.weight"):
            value.mul_(1e30)
    checkpoint.save(saved, path)
    words = (write_folders(tmp_path / "images", size=(8, 8)),) if command == "predict" else ()
    code, out, err = run(capsys, command, path, *words)
    assert (code, out) == (2, "")
    assert "no finite logits for" in err.splitlines()[-1]


def test_json_is_valid_whatever_the_figures():
    content = {"a": [NAN, INFINITE, -INFINITE, 1.5, None, True, "NaN"], "b": {"c": (NAN, 2)}}
    text = to_json(content)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, None, 1.5, None, True, "NaN"],
        "b": {"c": [None, 2]},
    }
    assert to_json({"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'


def test_a_description_with_such_figures_comes_back(tmp_path, few_blocks):
    """The digest is of what is written."""
    model = small_net()
    for ending in ("pt", "safetensors"):
        saved = checkpoint.capture(model, card_of(model, metrics={"val_loss": NAN, "loss": 1.5}))
        checkpoint.save(saved, tmp_path / f"a.{ending}")
        assert checkpoint.load(tmp_path / f"a.{ending}").card.metrics["loss"] == 1.5


def test_json_is_written_in_one_place():
    found = [
        str(path.relative_to(ROOT)) for path in (ROOT / "repan_cli").rglob("*.py") if JSON.search(path.read_text())
    ]
    assert not found, "system.files.to_json writes it"


JSON = re.compile(r"json\.dumps?\(")


def test_three_classes_have_no_top5(capsys, tmp_path, few_blocks):
    folder = write_folders(tmp_path / "images", classes=("ant", "bee", "cat"), size=(8, 8))
    words = ("--model", "repvgg_a0_cifar", "--dataset", "folder", "--data-root", folder, "--epochs", 1, "--json")
    code, out, err = run(capsys, "train", *words, "--batch-size", 8, "--out", tmp_path / "run")
    assert code == 0, err
    assert "top5" not in out
    assert "top-5" not in err
    for path in (tmp_path / "run").iterdir():
        if path.suffix in (".json", ".jsonl", ".csv", ".txt"):
            assert "top5" not in path.read_text(), path
    code, out, err = run(capsys, "evaluate", tmp_path / "run" / "best.pt")
    assert code == 0, err
    assert "top-1" in out
    assert "top-5" not in out
    code, out, err = run(capsys, "evaluate", tmp_path / "run" / "best.pt", "--json")
    assert "top5" not in json.loads(out)
    assert "test_top5" not in checkpoint.load(tmp_path / "run" / "last.pt").card.metrics
