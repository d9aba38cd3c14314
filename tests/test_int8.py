"""Int8: the report finds what suffers, the file is what was scored, calibration never sees the test set."""

import itertools
import json

import pytest
import torch
from support import one_line, run, small_net
from torch import nn

from repan_cli.blocks import reparameterize
from repan_cli.commands import quantize
from repan_cli.data import build
from repan_cli.export import int8
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


def test_signal_to_noise_of_uniform_values():
    """6.02 dB a bit: 8 bits of uniform values are 48.2 dB (any text on quantisation)."""
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


def test_quantize(capsys, few_blocks, small_run, tmp_path):
    out = tmp_path / "int8.onnx"
    code, text, err = run(capsys, "quantize", small_run.folder / "best.pt", "-o", out, "--images", "100", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["float32"]["top1"] == small_run.summary["test"]["top1"]
    assert found["int8"]["bytes"] == out.stat().st_size < 0.4 * found["float32"]["bytes"]
    assert len(found["layers"]) == 6
    _, text, _ = run(capsys, "evaluate", out, "--json")
    assert json.loads(text)["top1"] == found["int8"]["top1"]
    assert json.loads(text)["precision"] == "int8"
    assert "exists already" in one_line(capsys, "quantize", small_run.folder / "best.pt", "-o", out)
    assert "name a file that ends in .onnx" in one_line(capsys, "quantize", small_run.folder, "-o", tmp_path / "x.pt")
    assert "is exported already" in one_line(capsys, "quantize", out)
    again = tmp_path / "again.onnx"
    assert run(capsys, "quantize", small_run.folder / "best.pt", "-o", again, "--images", "100")[0] == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("wanted", [1, 64, 100, 1000, 5000])
def test_calibration_takes_training_images_evenly(digit_images, wanted):
    batches = list(quantize._calibration(digit_images, wanted))
    assert sum(map(len, batches)) == min(wanted, digit_images.count)
    whole = torch.cat([batch.images for batch in digit_images.batches(quantize.BATCH)])
    places = [next(n for n, image in enumerate(whole) if image.equal(batch[0])) for batch in batches]
    assert places[0] == 0
    assert len({b - a for a, b in itertools.pairwise(places)} or {0}) <= 2  # evenly, as far as batches allow


def test_calibration_is_asked_for_the_training_part_alone(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    asked = []
    original = build.eval_loader

    def watched(data, part, machine, **more):
        asked.append(part)
        return original(data, part, machine, **more)

    monkeypatch.setattr(quantize, "eval_loader", watched)
    assert run(capsys, "quantize", small_run.folder, "-o", tmp_path / "a.onnx", "--split", "val")[0] == 0
    assert asked == ["train", "val"]
