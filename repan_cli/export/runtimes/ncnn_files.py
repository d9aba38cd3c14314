"""ncnn: its network (`model.ncnn.param`, `model.ncnn.bin`), converted from the ONNX file by pnnx."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import Conversion, Kind, OneByOne, cannot
from repan_cli.system.packages import need_runtime

FILES = ("model.ncnn.param", "model.ncnn.bin")
SECONDS = 600
FOREIGN = ("pnnx.", "onnx", "aten", "prims", "F.", "nn.", "torch.")
"""Type prefixes of the layers that pnnx could not convert to ncnn."""

EXACT = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
"""The options of ncnn that reduce precision, which are turned off."""


def convert(conversion: Conversion) -> dict[str, bytes]:
    """Convert the ONNX file for one image; pnnx stores float16 unless it is told not to."""
    need_runtime("ncnn")
    import pnnx

    shape = ",".join(map(str, (1, *conversion.images.shape[1:])))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").write_bytes(conversion.onnx())
        words = [pnnx.EXEC_PATH, "model.onnx", f"inputshape=[{shape}]", "fp16=0"]
        try:
            subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=SECONDS)
            found = {name: (Path(folder) / name).read_bytes() for name in FILES}
        except (OSError, subprocess.SubprocessError) as error:
            raise cannot("ncnn", conversion, error) from error
    kinds = [line.split()[0] for line in found[FILES[0]].decode().splitlines()[2:]]
    if left := [kind for kind in kinds if kind.startswith(FOREIGN)]:
        raise cannot("ncnn", conversion, ValueError(f"ncnn has no operator {left[0]}"))
    return found


class NcnnNetwork(OneByOne):
    """The network in ncnn's files, on the CPU in float32."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        need_runtime("ncnn")
        import ncnn

        self._ncnn: Any = ncnn
        self._net = ncnn.Net()
        for name in EXACT:
            setattr(self._net.opt, name, False)
        self._net.opt.num_threads = torch.get_num_threads()
        if self._net.load_param(str(folder / FILES[0])) or self._net.load_model(str(folder / FILES[1])):
            raise InputError(f"{folder} cannot be opened by ncnn")

    def run(self, image: Tensor) -> Tensor:
        extractor = self._net.create_extractor()
        extractor.input("in0", self._ncnn.Mat(image[0].numpy()).clone())
        code, found = extractor.extract("out0")
        if code:
            raise InputError(f"ncnn cannot run the network (error {code})")
        return torch.from_numpy(np.array(found))[None]


KIND = Kind(
    "ncnn",
    FILES,
    convert,
    NcnnNetwork,
    'net.load_param("{folder}/model.ncnn.param"); net.load_model("{folder}/model.ncnn.bin")',
    any_batch=False,
)
