"""Int8: the report finds the layers that lose most, the scored file is the written one, calibration never uses test
images.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from shared_fixtures import FEW
from support import card_of, one_line, relative, run, small_net
from torch import nn

from repan_cli import checkpoint
from repan_cli.blocks import reparameterize
from repan_cli.commands import quantize
from repan_cli.data import build
from repan_cli.data.types import ArrayImages
from repan_cli.export import int8, onnx_file
from repan_cli.export.trace import trace
from repan_cli.models import repvgg_cifar
from repan_cli.system import timing
from repan_cli.system.packages import missing

pytestmark = pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_rounding_to_256_levels():
    values = torch.linspace(-1, 3, 1001, dtype=torch.float64)
    found = int8.quantized(values, values.min(), values.max())
    assert len(found.unique()) == 256
    assert (found - values).abs().max() <= 4 / 255 * 0.51
    assert (found == 0).any()  # zero is kept: padding stays what it is
    assert int8.quantized(values[values > 0.5], torch.tensor(0.5), torch.tensor(3.0)).min() > 0.49


@pytest.mark.parametrize("columns", [2, 8])
def test_large_inputs_are_sampled_in_all_columns(columns, monkeypatch):
    """Values in one column of several are seen as often as they occur."""
    monkeypatch.setattr(int8, "SAMPLED", 2**12)
    images = torch.zeros(2, 4, 64, 64)
    images[..., 1::columns] = torch.rand(2, 4, 64, 64 // columns, generator=torch.Generator().manual_seed(0)) + 1
    layer = nn.Conv2d(4, 4, 3)
    with int8._inputs_of({"a": layer}) as seen:
        layer(images)
    (values,) = seen["a"]
    assert len(values) == 2**12 + 2
    assert abs((values > 0).float().mean().item() - 1 / columns) < 0.03


def test_signal_to_noise_of_uniform_values():
    """6.02 dB a bit: 8 bits of uniform values are 48.2 dB (any text on quantization)."""
    values = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = int8.sqnr(values, int8.quantized(values, values.min(), values.max()))
    assert found == pytest.approx(48.2, abs=0.1)


def test_the_report_finds_the_layer_that_was_made_bad():
    model = reparameterize(small_net("repvgg"))
    before = {layer.name: layer for layer in int8.health(model, [X])}
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(before) == {*convs, "head"}
    bad = convs[5]
    with torch.no_grad():
        model.get_submodule(bad).weight[1] *= 1000  # channel 0 is zero
    after = {layer.name: layer for layer in int8.health(model, [X])}
    assert after[bad].weight_spread > 100 * before[bad].weight_spread
    assert after[bad].weight_sqnr_per_channel == pytest.approx(before[bad].weight_sqnr_per_channel, abs=1e-3)
    assert after[bad].weight_sqnr < before[bad].weight_sqnr - 20
    following = convs[6]  # reads one channel a thousand times as large as the others
    assert after[following].input_outlier > before[following].input_outlier
    others = [name for name in convs[:5] if after[name] != before[name]]
    assert not others


@pytest.mark.slow
def test_quantize(capsys, few_blocks, small_run, tmp_path):
    out = tmp_path / "int8.onnx"
    code, text, err = run(capsys, "quantize", small_run.folder / "best.pt", "-o", out, "--images", "100", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["float32"]["top1"] == small_run.summary["test"]["top1"]
    assert found["int8"]["bytes"] == out.stat().st_size < 0.4 * found["float32"]["bytes"]
    assert len(found["layers"]) == 6
    _, text, _ = run(capsys, "evaluate", out, "--json")
    times = found["milliseconds"]
    assert found["speedup"] == times["float32"] / times["int8"]
    assert json.loads(text)["top1"] == found["int8"]["top1"]
    assert json.loads(text)["precision"] == "int8"
    assert "already exists" in one_line(capsys, "quantize", small_run.folder / "best.pt", "-o", out)
    assert "name a file that ends in .onnx" in one_line(capsys, "quantize", small_run.folder, "-o", tmp_path / "x.pt")
    assert "is already exported" in one_line(capsys, "quantize", out)
    again = tmp_path / "again.onnx"
    assert run(capsys, "quantize", small_run.folder / "best.pt", "-o", again, "--images", "100")[0] == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("wanted", [1, 6, 64, 100, 599, 5000])
def test_calibration_takes_training_images_evenly(wanted):
    """Of a part in the order of its classes, as image folders are, every class is among few images."""
    labels = np.repeat(np.arange(6), 100)
    found = quantize.spread(
        ArrayImages(np.arange(600, dtype=np.uint16).view(np.uint8).reshape(600, 1, 1, 2), labels), wanted
    )
    assert len(found.labels) == len(found.images) == min(wanted, 600)
    assert len(set(found.labels.tolist())) == min(6, wanted)
    places = found.images.reshape(-1).view(np.uint16).tolist()
    assert places[0] == 0
    assert len({b - a for a, b in itertools.pairwise(places)} or {0}) <= 2


@pytest.mark.slow
def test_calibration_is_asked_for_the_training_part_alone(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    asked = []
    original = build.eval_loader

    def watched(data, part, machine, **more):
        asked.append((part, len(data.part(part).labels)))
        return original(data, part, machine, **more)

    monkeypatch.setattr(quantize, "eval_loader", watched)
    words = ["quantize", small_run.folder, "-o", tmp_path / "a.onnx", "--split", "val", "--images", "40", "--json"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(out)["calibration_images"] == 40
    assert [part for part, _ in asked] == ["train", "val"]
    assert asked[0] == ("train", 40)  # no other picture is read


# ---------------------------------------------------------------------------------------------- for other programs


@pytest.fixture(scope="module")
def graph():
    """A merged network of convolutions and a linear layer, and its file in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repvgg_cifar, "DEPTHS_A", FEW)
        model = reparameterize(small_net("repvgg"))
    header = checkpoint.header(checkpoint.capture(model, card_of(model)))
    return model, onnx_file.write(trace(model, X, "net"), header), header


def quantized(graph, **more):
    import onnx

    content = int8.quantize(graph[1], [X], graph[2], per_channel=True, **more)
    return content, onnx.load_from_string(content)


def zero_points(model):
    import onnx

    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield node, values.get(node.input[0]), values[node.input[2]]


@pytest.mark.slow
def test_files_for_tensorrt_have_its_scales_and_biases(few_blocks, graph):
    """Signed and symmetric: no zero point but 0, no bias in 32 bits."""
    content, model = quantized(graph, target="tensorrt")
    found = list(zero_points(model))
    assert len(found) > 10
    for node, constant, zero in found:
        assert zero.dtype == "int8", node.name
        assert not zero.any(), node.name
        assert constant is None or constant.dtype != "int32", node.name
    assert relative(onnx_file.OnnxNetwork(content)(X), graph[0](X)) < 0.3
    ort = list(zero_points(quantized(graph)[1]))
    assert any(zero.any() for _, _, zero in ort)  # which TensorRT refuses
    assert any(constant is not None and constant.dtype == "int32" for _, constant, _ in ort)


@pytest.mark.parametrize("target", int8.TARGETS)
def test_no_sets_of_operators_are_left_that_nothing_uses(few_blocks, graph, target):
    _, model = quantized(graph, target=target)
    assert [entry.domain for entry in model.opset_import] == [""]


def test_layers_can_be_left_out(few_blocks, graph):
    names = [name for name, layer in graph[0].named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    whole, none = quantized(graph)[0], quantized(graph, left_out=names)[0]
    wanted = graph[0](X)
    assert relative(onnx_file.OnnxNetwork(none)(X), wanted) < 0.2 * relative(onnx_file.OnnxNetwork(whole)(X), wanted)
    some = quantized(graph, left_out=names[:1])[1]
    (conv,) = [node for node in some.graph.node if node.op_type == "Conv" and node.input[1] == f"{names[0]}.weight"]
    assert conv.input[2] == f"{names[0]}.bias"


@pytest.mark.skipif(bool(missing("openvino")), reason="openvino is not installed")
def test_openvino_runs_its_file(few_blocks, graph):
    from repan_cli.export.runtimes.openvino_files import OpenVinoNetwork

    content, _ = quantized(graph, target="openvino")
    assert relative(OpenVinoNetwork(content)(X), onnx_file.OnnxNetwork(content)(X)) < 0.1


@pytest.mark.slow
def test_what_int8_costs_and_brings_is_reported(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "interleaved", lambda cases, seconds: dict(zip(cases, (fast, slow), strict=True)))
    fast, slow = timing.Timing(0.001, 0.001, 0.001, 5), timing.Timing(0.002, 0.002, 0.002, 5)
    words = ("quantize", small_run.folder / "best.pt", "--images", "64", "--overwrite", "-o", tmp_path / "a.onnx")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "1.00 ms in float32, 2.00 ms in int8 (0.50x), by ONNX Runtime here" in out
    assert "int8 is 2.0x slower than float32 by ONNX Runtime on this machine" in err
    fast, slow = slow, fast
    assert "slower" not in run(capsys, *words)[2]
    assert "not timed: TensorRT is not installed" in run(capsys, *words, "--target", "tensorrt")[1]


def test_layers_are_left_out_until_it_is_good_enough(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    judged = []
    original = int8.quantize

    def spoiled(content, batches, header, *, left_out=(), **more):
        judged.append(tuple(left_out))
        bad = [batch * 1e-3 for batch in batches] if len(left_out) < 4 else batches  # scales that clip everything
        return original(content, bad, header, left_out=left_out, **more)

    monkeypatch.setattr(int8, "quantize", spoiled)
    words = ("quantize", small_run.folder / "best.pt", "--images", "64", "-o", tmp_path / "a.onnx", "--json")
    code, out, err = run(capsys, *words, "--max-drop", "3")
    assert code == 0, err
    found = json.loads(out)
    assert [len(names) for names in judged] == [0, 1, 2, 4]
    assert found["left_out"] == list(judged[-1])
    order = sorted(found["layers"], key=lambda layer: min(layer["weight_sqnr_per_channel"], layer["input_sqnr"]))
    assert found["left_out"] == [layer["name"] for layer in order[:4]]
    assert found["float32"]["top1"] - found["int8"]["top1"] < 5


def test_bad_words(capsys, small_run, tmp_path):
    words = ("quantize", small_run.folder / "best.pt", "-o", tmp_path / "a.onnx")
    assert "--target trt is not one of ort, tensorrt, openvino" in one_line(capsys, *words, "--target", "trt")
    assert "--max-drop must be at least 0 points of top-1 accuracy, got -1" in one_line(
        capsys, *words, "--max-drop", "-1"
    )
