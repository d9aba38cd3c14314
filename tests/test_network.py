"""Sources of a run's network: user files, foreign weights, pretrained weights, repan's checkpoints."""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support import CPU, card_of, one_line, randomize_norms, relative, run
from torch import nn

import repan_cli
from repan_cli import checkpoint
from repan_cli.blocks import rep_blocks
from repan_cli.config.resolve import build
from repan_cli.data import datasets
from repan_cli.errors import InputError
from repan_cli.session import network
from repan_cli.system.device import Runtime
from repan_cli.system.user_code import function_of

NET = """
from torch import nn
import helper  # a file beside this one

def build(num_classes, in_chans=3, width=8):
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )

def fixed():
    return build(7, 1)

def broken(num_classes):
    return undefined

def number(num_classes):
    return 3

class Several(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.net = build(num_classes, in_chans)

    def forward(self, x):
        return self.net(x), x

class Seen(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x

def seen(num_classes, in_chans):
    return Seen(*build(num_classes, in_chans))

def leaves(num_classes):
    raise SystemExit(5)

def tied(num_classes, in_chans):
    model = build(num_classes, in_chans)
    model[3] = nn.utils.parametrizations.weight_norm(model[3])
    return model
"""
QUICK = [
    "--dataset",
    "digits",
    "--epochs",
    "1",
    "data.per_class=40",
    "data.batch_size=64",
    "run.precision=fp32",
    "--json",
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a user's own network in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "bad.py").write_text("x = 1\nimport nothing_of_that_name\n")
    (tmp_path / "syntax.py").write_text("def build(:\n")
    return tmp_path


def made(digits, **settings):
    given = {"data.name": "digits", **{key.replace("__", "."): str(value) for key, value in settings.items()}}
    return network.build("cycle", build(given), digits)


# ---------------------------------------------------------------------------------------------- own files


def test_a_network_of_ones_own_trains_cycles_fuses_and_loads(capsys, place):
    words = [*QUICK, "--baseline-epochs", 2, "--cycles", 1, "--block", "dbb", "--out", "run"]
    code, out, err = run(capsys, "cycle", "--model", "net.py:build", *words)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["model"] == "net.py:build"
    assert summary["fused"]["rel_error_fp64"] < 1e-12
    assert "repan evaluate run/fused.pt --model net.py:build" in " ".join(err.split())
    assert "give --model net.py:build" in one_line(capsys, "cycle", "--init", "run/best.pt", *QUICK)
    code, out, _ = run(capsys, "info", "run/best.pt", "--json")
    assert json.loads(out)["model"] == "net.py:build", "what a file says of itself needs no import"
    for command in ("evaluate", "fuse", "info"):
        if command != "info":
            assert "give --model net.py:build" in one_line(capsys, command, "run/best.pt")
        code, out, err = run(capsys, command, "run/best.pt", "--model", "net.py:build", "--json")
        assert code == 0, err
    assert json.loads(out)["layers"]["0"].startswith("dbb, 3x3")
    assert "returns a tuple" in one_line(capsys, "evaluate", "run/fused.pt", "--model", "net.py:seen")
    again = repan_cli.load("run/fused.pt", "net.py:build")
    assert [type(layer).__name__ for layer in again][:3] == ["Conv2d", "Identity", "ReLU"]
    code, _, err = run(capsys, "cycle", "--init", "run/last.pt", "--model", "net.py:build", *QUICK, "--cycles", 1)
    assert code == 0, err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.py:build", "no file none.py"),
        ("net.py:bild", "net.py has no function 'bild'; did you mean build"),
        ("bad.py:build", "cannot import bad.py: ModuleNotFoundError: No module named 'nothing_of_that_name' (line 2)"),
        ("syntax.py:build", "cannot import syntax.py: SyntaxError"),
        ("net.py:broken", "net.py:broken failed: NameError: name 'undefined' is not defined (line 16)"),
        ("net.py:leaves", "net.py:leaves failed: SystemExit: 5"),
        ("net.py:number", "returned int, not a torch.nn.Module"),
        ("net.py:fixed", "returns (2, 7) for 2 images, not (2, 10)"),
        ("net.py:Several", "returns a tuple for 2 images"),
    ],
)
def test_own_files_that_cannot_be_used_are_named_in_a_line(capsys, place, name, says):
    before = sorted(place.iterdir())
    assert says in one_line(capsys, "cycle", "--model", name, "--dataset", "digits")
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    assert sorted(place.iterdir()) == before


def test_a_layer_that_was_asked_for_and_cannot_merge_is_named(capsys, place):
    words = ("cycle", "--model", "net.py:tied", "--dataset", "digits", "block.include=3")
    assert "block.include: 3 cannot become a block: it is a ParametrizedConv2d" in one_line(capsys, *words)


# ---------------------------------------------------------------------------------------------- foreign weights


def tiny(name: str = "test_resnet", classes: int = 10) -> nn.Module:
    torch.manual_seed(1)
    return randomize_norms(timm.create_model(name, num_classes=classes, in_chans=1)).eval()


WRAPPINGS = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"lr": 0.1}},
    "model": lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.1)},
    "model_state": lambda weights: {"model_state": weights},
    "numbers": lambda weights: {"best": np.float64(3), "epoch": np.int64(2), "model": weights},
    "nested": lambda weights: {"checkpoint": 1, "model": {"state_dict": weights}},
    "lightning": lambda weights: {"state_dict": {f"backbone.{name}": value for name, value in weights.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_of_others_are_taken_where_they_belong(digits, tmp_path, wrapping):
    source = tiny()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "theirs.pth")
    found = made(digits, model__name="timm:test_resnet", model__init=tmp_path / "theirs.pth", block__name="dbb")
    assert found.finished
    assert found.expansion.family == "dbb"
    x = torch.randn(4, 1, 8, 8)
    assert relative(found.model.eval()(x), source(x)) < 1e-5
    assert all(block.attach_rate == 1 for _, block in rep_blocks(found.model)), "silent branches that train at once"


@pytest.mark.parametrize(
    "prefixes", [p for n in range(1, 5) for p in itertools.product(("module.", "_orig_mod."), repeat=n)][:16]
)
def test_prefixes_of_wrappers_come_off_in_any_nesting(tmp_path, prefixes):
    source = nn.Linear(2, 2)
    torch.save({"".join(prefixes) + name: value for name, value in source.state_dict().items()}, tmp_path / "a.pt")
    assert checkpoint.load_any(tmp_path / "a.pt").keys() == {"weight", "bias"}


def test_safetensors_of_others_and_weights_of_a_multi_branch_network(digits, tmp_path):
    source = tiny()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    found = made(digits, model__name="timm:test_resnet", model__init=tmp_path / "theirs.safetensors")
    x = torch.randn(4, 1, 8, 8)
    assert relative(found.model.eval()(x), source(x)) < 1e-5
    randomize_norms(found.model, 5)
    torch.save(found.model.state_dict(), tmp_path / "branches.pth")
    again = made(digits, model__name="timm:test_resnet", model__init=tmp_path / "branches.pth")
    assert torch.equal(again.model.eval()(x), found.model(x))


def test_another_number_of_classes_starts_a_new_classifier_and_needs_a_baseline(capsys, digits, tmp_path):
    source = tiny(classes=7)
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    found = made(digits, model__name="timm:test_resnet", model__init=tmp_path / "theirs.pth")
    assert found.new_classifier
    assert not found.finished
    assert "fc is re-initialized" in capsys.readouterr().err
    x = torch.randn(4, 1, 8, 8)
    assert relative(found.model.eval().forward_features(x), source.forward_features(x)) < 1e-5
    assert all(block.attach_rate == 1 for _, block in rep_blocks(found.model)), "silent branches that train at once"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": 1}, "holds no weights"),
        ([torch.zeros(1)], "holds no weights"),
        (tiny("resnet14t").state_dict(), "has, unlike the network,"),
        ({"fc.weight": torch.zeros(10, 512)}, "it lacks"),
        (
            {**tiny().state_dict(), "conv1.3.weight": torch.zeros(3)},
            "its 'conv1.3.weight' has the shape",
        ),
    ],
    ids=["no-tensors", "list", "deeper", "head-only", "shape"],
)
def test_weights_that_do_not_fit_are_named(digits, tmp_path, content, says):
    torch.save(content, tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=says):
        made(digits, model__name="timm:test_resnet", model__init=tmp_path / "theirs.pth")


def test_foreign_weights_need_the_name_of_their_network(digits, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match="does not name its network: give --model NAME"):
        made(digits, model__init=tmp_path / "theirs.pth")


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        ({"arch": "test_resnet"}, "give --model timm:test_resnet (the file says 'test_resnet')"),
        ({"architecture": "resnet18.a1_in1k"}, "give --model timm:resnet18.a1_in1k (the file says 'resnet18.a1_in1k')"),
        ({"model_name": "googlenet"}, "give --model torchvision:googlenet (the file says 'googlenet')"),
        ({"arch": "their own net"}, "give --model NAME"),
        ({"arch": 3, "model_name": "theirs"}, "give --model NAME"),
    ],
)
def test_a_name_that_a_file_notes_is_suggested(digits, tmp_path, capsys, noted, says):
    """As timm's trainer notes it; the name decides nothing, because it does not tell the library."""
    torch.save({"state_dict": tiny().state_dict(), **noted}, tmp_path / "theirs.pth.tar")
    with pytest.raises(InputError, match=re.escape(f"does not name its network: {says}") + "$"):
        made(digits, model__init=tmp_path / "theirs.pth.tar")
    assert one_line(capsys, "fuse", tmp_path / "theirs.pth.tar").endswith(f"does not name its network: {says}\n")


# ---------------------------------------------------------------------------------------------- pretrained


def test_pretrained_weights_of_timm(digits, monkeypatch, tmp_path):
    """From a file in place of the download, through timm's own loading."""
    source = timm.create_model("test_resnet", num_classes=1000)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    create = timm.create_model

    def with_file(name, **kwargs):
        overlay = {"file": str(tmp_path / "weights.safetensors")} if kwargs.get("pretrained") else None
        return create(name, **kwargs, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(timm, "create_model", with_file)
    found = made(digits, model__name="timm:test_resnet", model__pretrained=True)
    assert found.trained
    assert found.new_classifier
    weight = found.model.get_submodule("layer1.0.conv1").trunk.conv.weight
    assert torch.equal(weight, source.layer1[0].conv1.weight)


def test_pretrained_weights_of_torchvision(monkeypatch):
    from repan_cli import models

    theirs = torchvision.models.resnet18(num_classes=1000)
    weights = type(torchvision.models.get_model_weights("resnet18").DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **kwargs: theirs.state_dict())
    model = models.create("torchvision:resnet18", num_classes=10, in_chans=3, pretrained=True)
    assert torch.equal(model.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert model.fc.out_features == 10
    with pytest.raises(InputError, match="torchvision's networks read 3 channels"):
        models.create("torchvision:resnet18", num_classes=10, in_chans=1)


def test_weights_that_cannot_be_fetched_are_one_line(digits, monkeypatch):
    def no_network(*args, **kwargs):
        if kwargs.get("pretrained"):
            raise OSError("no route to host\nand a long story")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match=r"of timm:test_resnet \(no route .*FILE --model timm:test_resnet$"):
        made(digits, model__name="timm:test_resnet", model__pretrained=True)
    without = next(name for name in timm.list_models("*resnet*") if not timm.is_model_pretrained(name))
    with pytest.raises(InputError, match="no pretrained weights of"):
        made(digits, model__name=f"timm:{without}", model__pretrained=True)


# ---------------------------------------------------------------------------------------------- repan's checkpoints


@pytest.mark.soak
def test_a_network_trained_plain_is_expanded_and_cycled(capsys, place):
    words = [*QUICK, "--model", "timm:test_resnet", "optim.lr=0.01"]
    code, out, err = run(capsys, "train", *words, "--block", "plain", "--out", "plain")
    assert code == 0, err
    plain = json.loads(out)["test"]["top1"]
    code, out, err = run(
        capsys, "cycle", "--init", "plain/last.pt", "--block", "acb", *QUICK, "--cycles", 1, "--out", "b"
    )
    assert code == 0, err
    summary = json.loads(out)
    assert summary["block"] == "acb"
    assert summary["baseline"]["test_top1"] == plain
    assert summary["cycles"][0]["top1_after_restart"] == summary["cycles"][0]["top1_before"]
    assert "holds blocks of the family acb, not dbb" in one_line(
        capsys, "cycle", "--init", "b/last.pt", "--block", "dbb", *QUICK, "--cycles", 1
    )
    refused = one_line(capsys, "cycle", "--init", "b/last.pt", *QUICK, "--cycles", 1, "--baseline-epochs", 3)
    assert "baseline.epochs has no effect here" in refused


def test_a_checkpoint_on_images_it_does_not_fit_is_one_line(capsys, few_blocks, small_run):
    grey_as_colour = datasets.load("digits", "data", channels=3)
    given = {"data.name": "digits", "model.init": str(small_run.folder / "last.pt")}
    with pytest.raises(InputError, match="repvgg_a0_cifar does not run on images of 3x8x8"):
        network.build("cycle", build(given), grey_as_colour)


def test_settings_of_block_choose_what_restarts(digits):
    found = made(digits, model__name="repvgg_a0_cifar", block__include="stages.2.*", block__limit=3)
    chosen = network.restarted(build({"block.include": "stages.2.*", "block.limit": "3"}), found.model)
    assert len(chosen) == 3
    assert all(name.startswith("stages.2.") for name in chosen)
    assert network.restarted(build(), found.model) is None


def test_a_file_cannot_name_just_any_network(tmp_path):
    for name in ("timm:hf-hub:someone/something", "torchvision:resnet19", "resnet19"):
        saved = checkpoint.Checkpoint({}, card_of(nn.Identity(), name))
        checkpoint.save(saved, tmp_path / "a.pt")
        with pytest.raises(InputError, match="has no model"):
            repan_cli.load(tmp_path / "a.pt")


@pytest.mark.parametrize(("size", "precision"), [(8, "fp32"), (32, "bf16")])
def test_bf16_is_left_where_its_gradients_are_wrong(digits, capsys, size, precision):
    """A strided kernel on a map smaller than its stride, on a CPU: not merely inexact but uninitialised memory."""
    found = made(digits, model__name="timm:test_resnet")
    data = dataclasses.replace(digits, image_size=size)
    machine = network.safe_precision(Runtime(CPU, "bf16"), found, data, chosen="auto")
    assert machine.precision == precision
    assert ("smaller than its stride" in capsys.readouterr().err) == (precision == "fp32")
    assert network.safe_precision(Runtime(CPU, "bf16"), found, data, chosen="bf16").precision == "bf16"
    assert found.model.training


# ---------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_describes_the_run_and_writes_nothing(capsys, place):
    before = sorted(place.iterdir())
    words = ["cycle", "--model", "timm:test_resnet", "--dataset", "digits", "--dry-run"]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert len(facts["blocks"]) == 10
    assert any("kernel 1x1" in reason for reason in facts["left_alone"].values())
    assert facts["logits_moved"] < 1e-4
    assert facts["rel_error_fp64"] < 1e-10
    assert facts["estimated_seconds"] > 0
    code, out, _ = run(capsys, *words)
    assert code == 0
    for text in ("nothing was written", "left unchanged", "kernel 1x1", "about", "MiB"):
        assert text in out
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("classes", [("ant", "bee"), tuple("abcdefghij")], ids=["fewer", "other names"])
def test_repans_own_weights_of_other_classes_start_a_new_classifier(capsys, digits, tmp_path, classes):
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0_cifar", num_classes=len(classes), in_chans=1, block="repvgg")
    randomize_norms(model)
    checkpoint.save(
        checkpoint.capture(model, card_of(model, classes=classes, in_chans=1, mean=(0.5,), std=(0.2,))),
        tmp_path / "best.pt",
    )
    found = made(digits, model__init=tmp_path / "best.pt")
    assert found.new_classifier
    assert not found.finished
    assert "is re-initialized" in capsys.readouterr().err
    x = torch.randn(4, 1, 8, 8)
    assert relative(found.model.eval().forward_features(x), model.eval().forward_features(x)) < 1e-5


def test_an_edit_within_a_second_is_read_and_no_cache_is_written(tmp_path, monkeypatch):
    """Python takes a file of the same size and second for the one in __pycache__."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "net.py"
    for value in (1, 2):
        path.write_text(f"def build(): return {value}\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert function_of(f"{path}:build", what="a network")() == value
    assert list(tmp_path.iterdir()) == [path]
