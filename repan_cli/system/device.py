"""Describe the machine for a run: device, precision, threads."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repan_cli.errors import InputError
from repan_cli.system import host
from repan_cli.system.notices import warn
from repan_cli.system.ranks import join_ranks, own_gpu
from repan_cli.system.text import count


@dataclass(frozen=True)
class Runtime:
    """The device and precision of a network, and the rank of this process."""

    device: torch.device
    precision: str
    channels_last: bool = True
    rank: int = 0
    ranks: int = 1

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, in the memory format, and return it."""
        return network.to(self.device).to(memory_format=self.memory_format)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return autocast to bfloat16 or float16, or nothing in fp32 and tf32."""
        lower = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=lower, enabled=self.precision in ("bf16", "fp16"))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Compute float32 in TF32 within the context if `precision` is tf32: in the forward and backward passes of
        training.
        """
        if self.precision == "tf32":
            _allow_tf32(True)
        try:
            yield
        finally:
            if self.precision == "tf32":
                _allow_tf32(False)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler that fp16 needs; otherwise one that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def describe(self) -> str:
        """Return one line for users: device, threads, precision."""
        if self.device.type == "cuda":
            many = f", {self.ranks} of them" if self.ranks > 1 else ""
            return f"{self.device} ({torch.cuda.get_device_name(self.device)}{many}), {self.precision}"
        if self.device.type == "mps":
            return f"mps, {self.precision}"
        many = f"{self.ranks} processes, " if self.ranks > 1 else ""
        return f"cpu, {many}{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, {self.precision}"


def start_runtime(
    device: str = "auto", precision: str = "auto", *, channels_last: bool = True, deterministic: bool = False
) -> Runtime:
    """Return the runtime that the settings describe on this machine. From now on float32 is computed in full float32,
    and with `deterministic` only by kernels that give the same bits every time.

    Raises InputError for a device or a precision that is not available.
    """
    _allow_tf32(False)
    if deterministic:
        _use_deterministic_kernels()
    rank, ranks = join_ranks(device)
    found = (own_gpu(device) if ranks > 1 else None) or find_device(device)
    return Runtime(found, find_precision(precision, found), channels_last, rank, ranks)


def _allow_tf32(allowed: bool) -> None:
    """Let GPUs compute float32 with 10 bits of mantissa, or not; by default PyTorch does so for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _use_deterministic_kernels() -> None:
    """Let PyTorch choose deterministic kernels, and raise RuntimeError for an operator that has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)


def use_threads(asked: int | None) -> int:
    """Set the number of PyTorch's CPU threads, and return it.

    None means OMP_NUM_THREADS, or the number of cores that are free now: two threads on one free core are many times
    slower than one.
    """
    if asked is None:
        if any(os.environ.get(name) for name in THREAD_VARIABLES):
            return torch.get_num_threads()
        asked, usable = min(host.free_cores(), torch.get_num_threads()), host.usable_cores()
        if asked < min(usable, torch.get_num_threads()):
            warn(
                f"training uses {count(asked, 'thread')}, because other processes use this machine's "
                f"{count(usable, 'core')}; run.threads={usable} uses all"
            )
    torch.set_num_threads(asked)
    return asked


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user or a launcher sets the number of threads of a process."""


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        meant = f"cuda:{name}" if name.isdigit() else "cuda" if name.lower().startswith("gpu") else None
        hint = f"did you mean {meant}?" if meant else "give auto, cpu, cuda, cuda:N or mps"
        raise InputError(f"unknown device '{name}'; {hint}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name} is not supported; give auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not available: PyTorch sees no Apple GPU; try --device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not available: PyTorch sees {torch.cuda.device_count()} GPUs; try --device auto"
        )
    return device


def find_precision(name: str, device: torch.device) -> str:
    """Return the precision that `name` means: `auto` is bf16 if the device computes in it, else fp32.

    Raises InputError if tf32 is asked for without a GPU that has it.
    """
    if name == "tf32" and device.type != "cuda":
        raise InputError(f"precision tf32 is for NVIDIA GPUs, the device is {device.type}: give fp32")
    if name != "auto":
        return name
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in native) else "fp32"


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """Return the description of the machine for a run's env.json."""
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": str(runtime.device),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "precision": runtime.precision,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the largest number of bytes that this process has held, on the GPU or in memory; None if not known."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host.peak_memory()
