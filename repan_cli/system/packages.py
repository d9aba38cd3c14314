"""Optional packages: code that needs one reports this before it begins, with the line that installs it."""

from __future__ import annotations

import importlib.util

from repan_cli.errors import InputError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages by which ONNX files are written and proven."""


RUNTIME_PACKAGES = {
    "torchscript": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "ncnn": ("onnx", "onnxscript", "pnnx", "ncnn"),
    "tflite": ("litert_torch", "ai_edge_litert"),
    "coreml": ("coremltools",),
}
"""The packages that write and run each format of another program; the name of the extra is that of the format."""


def missing(*packages: str) -> list[str]:
    """Return the packages that are not installed, importing none."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def need(what: str, extra: str, *packages: str) -> None:
    """Raise InputError, with the line that installs them, if a package that `what` needs is missing."""
    if lacking := missing(*packages):
        raise InputError(f"{what} needs {' and '.join(lacking)}: pip install 'repan-cli[{extra}]'")


def need_runtime(kind: str) -> None:
    """Raise InputError if a package is missing that writes and runs a format of another program."""
    need(f"the format {kind}", kind, *RUNTIME_PACKAGES[kind])
