"""The page of promises names tests that exist, and promises that had no test of their own have one here."""

import ast
import re
from functools import cache

import pytest
import torch
from support import ROOT, card_of, plan, run, small_net, training
from torch import nn

from repan_cli import checkpoint
from repan_cli.commands import fuse, quantize
from repan_cli.errors import InputError
from repan_cli.system.packages import missing
from repan_cli.training.loop import fit

PAGE = (ROOT / "docs" / "promises.md").read_text()


@cache
def functions(file):
    """The functions of a file of tests, and whether each is left out by default whatever its parameters."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    long = {"pytest.mark.soak", "pytest.mark.survey"}
    whole = any(ast.unparse(node) == "pytestmark = pytest.mark.soak" for node in tree.body)
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: whole or bool(long & set(map(ast.unparse, node.decorator_list))) for node in tests}


def test_every_test_that_the_page_names_exists():
    """Those called long, and no others, are left out by default."""
    named = re.findall(r"^- (long)?.*?`((?:soak/)?test_\w+\.py)::(\w+)`(?:, `(\w+\.py)::(\w+)`)?", PAGE, re.M)
    assert sum(1 + bool(more) for *_, more in named) == len(re.findall(r"test_\w+\.py", PAGE)) > 30
    for long, *places in named:
        for file, function in zip(places[::2], places[1::2], strict=True):
            assert not file or functions(file).get(function) == bool(long), f"{file}::{function}"


class Louder(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images) * 1.001


def test_a_file_that_computes_something_else_is_not_written(capsys, few_blocks, tmp_path, monkeypatch):
    model = small_net()
    checkpoint.save(checkpoint.capture(model, card_of(model)), tmp_path / "net.pt")
    opened = fuse._Job._opened

    def louder(job, *given):
        network, program = opened(job, *given)
        return Louder(network), program

    monkeypatch.setattr(fuse._Job, "_opened", louder)
    code, _, err = run(capsys, "fuse", tmp_path / "net.pt", "-o", tmp_path / "fused.safetensors")
    assert code == 1
    assert "fused.safetensors would differ from the network: relative error 1.0e-03; not written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_restarts_look_at_no_test_image(few_blocks, digits):
    """Other test images change the figures on them alone: no restart is calibrated on them, no epoch chosen by them."""
    runs = [training(digits, plan(epochs="1", baseline__epochs="1", cycle__start_from="best")) for _ in range(2)]
    runs[1].test = runs[1].val
    events = [list(fit(each)) for each in runs]
    assert events[0][-1].test_loss != events[1][-1].test_loss
    one, other = (each.model.state_dict() for each in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
def test_layers_stay_in_float32_by_the_validation_part(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    asked, made = [], quantize.eval_loader

    def watched(data, part, *given, **more):
        asked.append(part)
        return made(data, part, *given, **more)

    def judged(job, most, content, layers, network, judge, classes):
        raise InputError(f"{judge.count} images judge")

    monkeypatch.setattr(quantize, "eval_loader", watched)
    monkeypatch.setattr(quantize._Job, "within", judged)
    monkeypatch.setattr(quantize._Job, "content", lambda job, left_out: b"")
    monkeypatch.setattr(quantize.onnx_file, "write", lambda *given: b"")
    monkeypatch.setattr(quantize, "trace", lambda *given: None)
    assert run(capsys, "quantize", small_run.folder, "-o", tmp_path / "a.onnx", "--max-drop", "1")[2] == (
        "Error: 143 images judge\n"
    )
    assert asked == ["train", "val"]
