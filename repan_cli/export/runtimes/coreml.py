"""Core ML: `model.mlpackage`, converted from PyTorch by coremltools. It runs only on macOS."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import INPUT, Conversion, Kind, OneByOne, cannot
from repan_cli.export.trace import quiet, trace
from repan_cli.system.packages import need_runtime
from repan_cli.system.text import first_line

PACKAGE = "model.mlpackage"
INSIDE = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin")
FILES = tuple(f"{PACKAGE}/{name}" for name in INSIDE)
OUTPUT = "logits"


def convert(conversion: Conversion) -> dict[str, bytes]:
    """Convert a network for one image, weights and arithmetic in float32."""
    need_runtime("coreml")
    import coremltools

    image = torch.cat([conversion.images[:1]] * 2)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            program = trace(conversion.network, image, conversion.source).run_decompositions({})
            converted: Any = coremltools.convert(
                program,
                inputs=[coremltools.TensorType(name=INPUT, shape=tuple(image[:1].shape))],
                outputs=[coremltools.TensorType(name=OUTPUT)],
                compute_precision=coremltools.precision.FLOAT32,
            )
            converted.save(str(Path(folder) / PACKAGE))
            return {name: (Path(folder) / name).read_bytes() for name in FILES}
    except InputError:
        raise
    except Exception as error:
        raise cannot("Core ML", conversion, error) from error


def why_not() -> str | None:
    """Return why this machine cannot run Core ML."""
    return None if platform.system() == "Darwin" else "Core ML runs only on macOS"


class CoreMLNetwork(OneByOne):
    """The network in a Core ML package, on the CPU of a Mac."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        if reason := why_not():
            raise InputError(f"{path} cannot be opened here: {reason}")
        need_runtime("coreml")
        import coremltools

        try:
            self._model: Any = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
        except Exception as error:
            raise InputError(f"{path} cannot be opened by Core ML: {first_line(error)}") from None

    def run(self, image: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self._model.predict({INPUT: image.numpy()})[OUTPUT], dtype=np.float32))


KIND = Kind(
    "Core ML",
    FILES,
    convert,
    lambda folder: CoreMLNetwork(folder / PACKAGE),
    'coremltools.models.MLModel("{folder}/model.mlpackage").predict({{"images": image}})["logits"]',
    why_not,
    any_batch=False,
)
