"""ONNX files in float16: their error is measured, printed and stored; values beyond float16 are refused."""

import json
import types

import pytest
import torch
from support import one_line, run, write_folders
from torch import nn

from repan_cli.data import class_folders
from repan_cli.data.image_files import UnreadableImageError
from repan_cli.data.preprocess import Preparation
from repan_cli.errors import InputError
from repan_cli.export import half
from repan_cli.session import artifact_images
from repan_cli.session.artifact import open_artifact
from repan_cli.system.packages import missing

pytestmark = [
    pytest.mark.usefixtures("few_blocks"),
    pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing"),
]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [(), pytest.param(("--with-normalize",), marks=pytest.mark.soak)])
def test_a_file_in_float16(capsys, small_run, tmp_path, normalize):
    path, whole = tmp_path / "half.onnx", tmp_path / "whole.onnx"
    assert run(capsys, "fuse", small_run.folder, "-o", whole)[0] == 0
    code, out, err = run(capsys, "fuse", small_run.folder, "-o", path, "--half", "--json", *normalize)
    assert code == 0, err
    told = json.loads(out)["float16"]
    assert path.stat().st_size < 0.6 * whole.stat().st_size
    assert 0 < told["rel_error"] < 1e-2
    assert (told["images"], told["real"]) == (256, True)
    stored = open_artifact(str(path)).card
    assert (stored.float16, stored.precision) == (told, "float16")

    _, out, _ = run(capsys, "evaluate", path, "--json")
    found = json.loads(out)
    assert (found["precision"], found["runtime"]) == ("float16", "ONNX Runtime")
    assert abs(found["top1"] - small_run.summary["test"]["top1"]) <= 100 * (1 - told["top1_agreement"]) + 1

    import onnx

    model = onnx.load(path)
    kinds = {tensor.data_type for tensor in model.graph.initializer} - {onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_cost_is_printed(capsys, small_run, tmp_path):
    _, out, _ = run(capsys, "fuse", small_run.folder, "-o", tmp_path / "half.onnx", "--half")
    line = next(line for line in out.splitlines() if line.startswith("float16"))
    assert "relative error" in line
    assert "% of 256 real images" in line


def test_the_report_counts_images_of_another_class():
    first = nn.Linear(4, 4, bias=False)
    first.weight.data = torch.eye(4)
    second = nn.Linear(4, 4, bias=False)
    second.weight.data = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5]))
    images = torch.eye(4) + torch.tensor([0.7, 0, 0, 0])  # the last image is of class 0 in the second network
    found = half.compare(second, first, [(part, part) for part in images.split(3)], real=True)
    assert (found.images, found.top1_agreement) == (4, 0.75)
    assert found.rel_error == pytest.approx(0.5 / 1.7)


def test_numbers_beyond_float16_are_refused():
    """ONNX Runtime computes in float32 on CPUs, and would not show it."""
    network = nn.Conv2d(3, 4, 1).eval()
    network.weight.data.fill_(40000.0)
    with pytest.raises(InputError, match="it computes numbers beyond 65504, the largest of float16"):
        half.bound(network, torch.ones(2, 3, 4, 4), "it")


def test_a_network_that_returns_no_logits_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return {"out": x, "aux": x}

    with pytest.raises(InputError, match="it returns a dict, and float16 is measured on logits"):
        half.bound(Pair(), torch.ones(2, 3, 4, 4), "it")


def test_half_is_for_onnx(capsys, small_run, tmp_path):
    for words in (("-f", "pt"), ("-f", "onnx", "-f", "pt2")):
        line = one_line(capsys, "fuse", small_run.folder, "-o", tmp_path / "a", "--half", *words)
        assert "--half is for ONNX files: use --format onnx" in line
    assert not [*tmp_path.iterdir()]


def test_a_broken_image_is_no_reason_to_take_noise(tmp_path):
    root = write_folders(tmp_path / "photos", parts=("test",), count=3, size=(8, 8))
    files = sorted((root / "test" / "ant").iterdir())
    files[1].write_bytes(b"broken")
    preparation = Preparation(8, 3, (0.5,) * 3, (0.5,) * 3, resized=False)
    artifact = types.SimpleNamespace(preparation=preparation)
    assert len(artifact_images._of_folders(artifact, root, 6)) == 5
    for file in root.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match="cannot read the image"):
        artifact_images._of_folders(artifact, root, 6)


def test_real_images_of_folders_are_of_every_class(tmp_path):
    folders = class_folders.class_folders(write_folders(tmp_path / "images") / "test")
    assert [path.name for path in class_folders.first_images(folders["ant"], 4)] == [f"{n}.png" for n in range(4)]
    assert len(class_folders.first_images(folders["bee"], 100)) == 6
