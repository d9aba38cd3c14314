"""`repan --version -v`: print versions and machine for bug reports, without loading torch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import repan_cli
from repan_cli.display.console import NAME_WIDTH
from repan_cli.runs.directory import PACKAGES
from repan_cli.system.host import memory_bytes, processor, usable_cores
from repan_cli.system.text import count

OPTIONAL = ("matplotlib", "scikit-learn", "tensorboard", "wandb", "onnx", "onnxruntime", "openvino", "datasets")
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def run() -> None:
    """Print the environment on stdout, one row per fact."""
    for name, text in rows():
        print(f"{name:<{NAME_WIDTH}}{text}")


def rows() -> Iterator[tuple[str, str]]:
    yield "repan", f"{repan_cli.__version__} in {Path(repan_cli.__file__).parent}"
    yield "python", f"{platform.python_version()} in {sys.prefix}"
    for package in PACKAGES:
        yield package, _version(package) or "missing"
    yield "optional", ", ".join(f"{name} {_version(name) or 'missing'}" for name in OPTIONAL)
    yield "extras", _extras()
    yield "system", platform.platform()
    yield "cpu", f"{processor()}, {count(os.cpu_count() or 1, 'core')}, {usable_cores()} for this process"
    if memory := memory_bytes():
        yield "memory", f"{memory / 2**30:.1f} GiB"
    yield from _gpus()


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _extras() -> str:
    """List the extras of repan, and mark those that lack packages here."""
    try:
        about = metadata("repan-cli")
    except PackageNotFoundError:
        return "unknown, repan runs from a checkout that is not installed"
    needs: dict[str, list[str]] = {extra: [] for extra in about.get_all("Provides-Extra") or ()}
    for line in about.get_all("Requires-Dist") or ():
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if package and extra:
            needs[extra[1]].append(package[0])
    whole = {extra: all(map(_version, packages)) for extra, packages in needs.items()}
    return ", ".join(f"{extra}{'' if there else ' (missing)'}" for extra, there in whole.items())


def _gpus() -> Iterator[tuple[str, str]]:
    """Yield the GPUs that the driver reports. torch is asked only if there are any."""
    built = _torch_built_for()
    try:
        answer = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        why = "fails" if shutil.which(GPU_QUERY[0]) else "is not there"
        yield "gpu", f"none found: nvidia-smi {why}" + (f" ({error})" if why == "fails" else "")
        yield "cuda", f"torch is built for {built}"
        return
    for number, line in enumerate(answer.strip().splitlines()):
        name, memory, driver = line.split(", ")
        yield f"gpu {number}", f"{name}, {memory}, driver {driver}"
    seen = importlib.import_module("torch").cuda.device_count()
    yield "cuda", f"torch is built for {built} and sees {count(seen, 'GPU')}"


def _torch_built_for() -> str:
    found = importlib.util.find_spec("torch")
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8") if found and found.origin else ""
    built = re.search(r"^(cuda|hip)\b[^=]*= ['\"]([^'\"]+)", text, re.M)
    return f"{built[1].upper()} {built[2]}" if built else "the CPU only"
