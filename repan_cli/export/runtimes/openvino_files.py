"""OpenVINO: its model (`model.xml`, `model.bin`), converted from the ONNX file, run on the CPU in float32."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import Conversion, Kind, cannot
from repan_cli.system.packages import need_runtime
from repan_cli.system.signals import kept_signal_stack
from repan_cli.system.text import first_line

FILES = ("model.xml", "model.bin")
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO uses bfloat16 by default if the processor supports it, with an error of 1e-2."""

ENDLESS = re.compile(rb'type="(Loop|TensorIterator)"')
"""Layers with which even a small file may compute forever; repan writes none."""


def convert(conversion: Conversion) -> dict[str, bytes]:
    """Convert the ONNX file, its weights in float32."""
    need_runtime("openvino")
    import onnx
    import openvino

    model = onnx.load_from_string(conversion.onnx())
    del model.metadata_props[:]
    try:
        converted = openvino.Core().read_model(model.SerializeToString())
        converted.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILES[0]
            openvino.save_model(converted, path, compress_to_fp16=False)
            return {name: (path.parent / name).read_bytes() for name in FILES}
    except Exception as error:
        raise cannot("OpenVINO", conversion, error) from error


class OpenVinoNetwork(nn.Module):
    """The network in an OpenVINO model: (N, C, H, W) to logits (N, classes), on the CPU in float32.

    `model` is the path of the `.xml` file, or the bytes of an ONNX file. `threads` defaults to torch's number.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None) -> None:
        super().__init__()
        need_runtime("openvino")
        import openvino

        if isinstance(model, Path) and ENDLESS.search(model.read_bytes()):
            raise InputError(f"{model} holds a loop, which may never end: refused")
        core = openvino.Core()
        settings: dict[str, Any] = {**EXACT, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        try:
            with kept_signal_stack():
                self._compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except Exception as error:
            name = model if isinstance(model, Path) else "the network"
            raise InputError(f"{name} cannot be opened by OpenVINO: {first_line(error)}") from None

    def forward(self, images: Tensor) -> Tensor:
        try:
            found = self._compiled(images.detach().cpu().float().contiguous().numpy())[0]
        except Exception as error:
            raise InputError(f"OpenVINO cannot run the network: {first_line(error)}") from None
        return torch.from_numpy(found.copy()).to(images.device)


KIND = Kind(
    "OpenVINO",
    FILES,
    convert,
    lambda folder: OpenVinoNetwork(folder / FILES[0]),
    'openvino.Core().compile_model("{folder}/model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})(images)[0]',
)
