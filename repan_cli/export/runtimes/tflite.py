"""LiteRT, which was TensorFlow Lite: `model.tflite`, converted from PyTorch by litert-torch."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import Conversion, Kind, OneByOne, cannot
from repan_cli.export.trace import quiet
from repan_cli.system.packages import need_runtime
from repan_cli.system.text import first_line

FILE = "model.tflite"


def convert(conversion: Conversion) -> dict[str, bytes]:
    """Convert a network for one image, channels first as in PyTorch, in float32."""
    need_runtime("tflite")
    import litert_torch

    network = copy.deepcopy(conversion.network).eval().requires_grad_(False)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            litert_torch.convert(network, (conversion.images[:1].contiguous(),)).export(str(path))
            return {FILE: path.read_bytes()}
    except Exception as error:
        raise cannot("LiteRT", conversion, error) from error


class TfliteNetwork(OneByOne):
    """The network in a `.tflite` file, on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        need_runtime("tflite")
        from ai_edge_litert.interpreter import Interpreter

        try:
            self._interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
            self._interpreter.allocate_tensors()
        except Exception as error:
            raise InputError(f"{path} cannot be opened by LiteRT: {first_line(error)}") from None
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def run(self, image: Tensor) -> Tensor:
        try:
            self._interpreter.set_tensor(self._input, image.numpy())
            self._interpreter.invoke()
            return torch.from_numpy(self._interpreter.get_tensor(self._output).copy())
        except Exception as error:
            raise InputError(f"LiteRT cannot run the network: {first_line(error)}") from None


KIND = Kind(
    "LiteRT",
    (FILE,),
    convert,
    lambda folder: TfliteNetwork(folder / FILE),
    'ai_edge_litert.interpreter.Interpreter("{folder}/model.tflite")',
    any_batch=False,
)
