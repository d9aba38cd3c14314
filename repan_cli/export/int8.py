"""Quantize to int8: the precision of each layer in 8 bits, and static quantization after training by ONNX Runtime.

Merged RepVGG-like networks are known to lose much of their accuracy in int8, because merging adds kernels of very
different ranges (QARepVGG, Chu et al. 2022). The report shows in which layers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repan_cli.config.conventions import INT8_TARGETS
from repan_cli.errors import InputError
from repan_cli.export import onnx_file
from repan_cli.export.trace import quiet
from repan_cli.system.packages import need
from repan_cli.system.text import first_line

ORT, TENSORRT, OPENVINO = TARGETS = INT8_TARGETS
"""The programs that an int8 file can be made for."""

EXTRA: Mapping[str, Mapping[str, bool]] = {
    ORT: {},
    OPENVINO: {"QuantizeBias": False},
    TENSORRT: {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": True,
        "QuantizeBias": False,
    },
}
"""The options of ONNX Runtime's quantizer for each target.

TensorRT takes only zero points of 0, and biases in float32.
"""

WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
"""The operators that layers become. Their second input is the weight."""

LEVELS = 255
USUAL = 0.999
"""The share of values that do not count as outliers."""

SAMPLED = 2**18
"""The number of values of a layer's input that are looked at in each batch."""


@dataclass(frozen=True)
class LayerHealth:
    """The quality of a layer in 8 bits.

    `weight_spread` is the largest range of an output channel's weights over the median range. With one scale for the
    whole kernel, the other channels have to share the bits that are left. `input_outlier` is the largest value that the
    layer reads over the 99.9th percentile.

    The rest are signal-to-noise ratios in dB, where 6 dB are one bit. They are given for the weights (mean over output
    channels) with one scale and with one scale per channel, and for the layer's input.
    """

    name: str
    weight_spread: float
    input_outlier: float
    weight_sqnr: float
    weight_sqnr_per_channel: float
    input_sqnr: float

    def worst(self, *, per_channel: bool) -> float:
        return min(self.weight_sqnr_per_channel if per_channel else self.weight_sqnr, self.input_sqnr)


def quantized(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round values to the 256 levels between `low` and `high`, one of which is zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / LEVELS).clamp_min(torch.finfo(values.dtype).tiny)
    zero = (-low / scale).round()
    return ((values / scale + zero).round().clamp(0, LEVELS) - zero) * scale


def sqnr(values: Tensor, approximate: Tensor) -> float:
    """Return the ratio of signal to quantization noise in dB; infinite if nothing is lost."""
    noise, signal = (values - approximate).square().sum().item(), values.square().sum().item()
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


@torch.no_grad()
def health(network: nn.Module, batches: Iterable[Tensor]) -> list[LayerHealth]:
    """Return the health of each convolution and linear layer of a merged network on batches (N, C, H, W) on the CPU."""
    network.eval()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    with _inputs_of(layers) as seen:
        for batch in batches:
            network(batch)
    return [_health_of(name, layer.weight, torch.cat(seen[name])) for name, layer in layers.items() if seen[name]]


@contextmanager
def _inputs_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, within the context, a sample of each layer's inputs, with the smallest and largest value."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def look(name: str, values: Tensor) -> None:
        flat = values.detach().float().flatten()
        some = flat
        if len(flat) > SAMPLED:  # even steps could meet the same columns of every row
            some = flat[torch.randint(len(flat), (SAMPLED,), generator=torch.Generator().manual_seed(0))]
        seen[name].append(torch.cat([some, flat.min()[None], flat.max()[None]]))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _health_of(name: str, weight: Tensor, read: Tensor) -> LayerHealth:
    rows = weight.detach().double().flatten(1)
    bounds = rows.abs().amax(dim=1)
    whole, each = bounds.max(), bounds[:, None]
    read = read.double()
    usual = read.abs().kthvalue(max(1, int(USUAL * read.numel()))).values
    return LayerHealth(
        name=name,
        weight_spread=_ratio(whole, bounds.median()),
        input_outlier=_ratio(read.abs().max(), usual),
        weight_sqnr=_mean_sqnr(rows, quantized(rows, -whole, whole)),
        weight_sqnr_per_channel=_mean_sqnr(rows, quantized(rows, -each, each)),
        input_sqnr=sqnr(read, quantized(read, read.min(), read.max())),
    )


def _mean_sqnr(rows: Tensor, approximate: Tensor) -> float:
    """Average over the output channels that are not zero: a strong channel would hide what is lost in the others."""
    found = [sqnr(row, other) for row, other in zip(rows, approximate, strict=True) if row.any()]
    return sum(found) / len(found) if found else math.inf


def _ratio(large: Tensor, small: Tensor) -> float:
    return (large / small).item() if small > 0 else math.inf


def quantize(
    content: bytes,
    batches: Iterable[Tensor],
    header: dict[str, Any],
    *,
    per_channel: bool,
    target: str = ORT,
    left_out: Iterable[str] = (),
) -> bytes:
    """Quantize an `.onnx` file to int8: weights and layer inputs.

    The scales come from the smallest and largest values on calibration images (N, C, H, W).

    Args:
        content: the file in float32, from `onnx_file.write`.
        header: the description that goes into the new file.
        per_channel: whether each output channel of the weights has its own scale; else each layer has one.
        target: the program that the file is made for, one of `TARGETS`.
        left_out: the names of layers that stay in float32.
    """
    need("int8", *onnx_file.PACKAGES)
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    signed = target == TENSORRT
    with tempfile.TemporaryDirectory() as folder, quiet():
        first, ready, done = (Path(folder) / f"{name}.onnx" for name in ("float32", "ready", "int8"))
        first.write_bytes(content)
        try:
            quant_pre_process(first, ready, skip_symbolic_shape=True)
            quantization.quantize_static(
                ready,
                done,
                _reader(batches),
                per_channel=per_channel,
                activation_type=quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=_nodes_of(onnx.load(ready), left_out),
                extra_options=dict(EXTRA[target]),
            )
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot quantize the network: {first_line(error)}") from error
        model = onnx.load(done)
    model.producer_name, model.producer_version = "repan", ""
    del model.metadata_props[:]
    _drop_unused_domains(model)
    return onnx_file.seal(model, header)


def _nodes_of(model: Any, layers: Iterable[str]) -> list[str]:
    """Return the names of the nodes that hold the weights of layers."""
    weights = {f"{name}.weight" for name in layers}
    return [node.name for node in model.graph.node if node.op_type in WITH_WEIGHTS and weights & {*node.input[1:2]}]


def _drop_unused_domains(model: Any) -> None:
    """Remove operator sets that no node uses: other programs refuse sets that they do not know."""
    used = {node.domain for part in (model.graph, *model.functions) for node in part.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _reader(batches: Iterable[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):
        """Batches one after the other, as ONNX Runtime asks for them."""

        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {onnx_file.INPUT: batch.cpu().contiguous().numpy()}

    return Batches()
