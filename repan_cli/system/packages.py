"""Check optional packages: code that needs one reports this before it begins, with the line that installs it."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

from repan_cli.errors import InputError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages with which ONNX files are written and proven."""


RUNTIME_PACKAGES = {
    "torchscript": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "ncnn": ("onnx", "onnxscript", "pnnx", "ncnn"),
    "tflite": ("litert_torch", "ai_edge_litert"),
    "coreml": ("coremltools",),
}
"""The packages that write and run each format of another program."""


def missing(*packages: str) -> list[str]:
    """Return the packages that are not installed, importing none."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


NAMES_OF_PIP = {"sklearn": "scikit-learn", "litert_torch": "litert-torch", "ai_edge_litert": "ai-edge-litert"}
"""The names of packages on the index that differ from the names by which they are imported."""


def how_to_install(*packages: str) -> str:
    """Return the command that installs packages for the running Python."""
    return shlex.join([_python(), "-m", "pip", "install", *(NAMES_OF_PIP.get(name, name) for name in packages)])


def _python() -> str:
    """Return the running interpreter as the user would type it: 'python' if that finds it, else its path."""
    here = Path(sys.executable)
    if shutil.which("python") == str(here):
        return "python"
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def need(what: str, *packages: str) -> None:
    """Raise InputError, with the command that installs it, if a package that `what` needs is missing."""
    if lacking := missing(*packages):
        raise InputError(f"{what} needs {' and '.join(lacking)}: {how_to_install(*lacking)}")


def need_runtime(kind: str) -> None:
    """Raise InputError if a package is missing that writes and runs another program's format."""
    need(f"the format {kind}", *RUNTIME_PACKAGES[kind])
