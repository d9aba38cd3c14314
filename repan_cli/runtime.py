"""The machine: device, precision, threads, and randomness keyed by position instead of by generator state."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import signal
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from repan_cli.errors import InputError


def key(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, such as (seed, cycle, epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by position: the same draws whatever ran before."""
    return torch.Generator().manual_seed(key(*parts))


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 ask the run to stop; a second SIGINT raises KeyboardInterrupt.

    Calling it says whether one has come; `received` is the first.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            self._before = {number: signal.signal(number, self._take) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __call__(self) -> bool:
        return self.received is not None


@dataclass(frozen=True)
class Runtime:
    """Where and in what precision a network runs."""

    device: torch.device
    precision: str
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 or float16, or nothing in fp32."""
        lower = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=lower, enabled=self.precision != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler that fp16 needs; one that does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def describe(self) -> str:
        """One line for people: device, threads, precision."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)}), {self.precision}"
        if self.device.type == "mps":
            return f"mps, {self.precision}"
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, {self.precision}"


def start(device: str = "auto", precision: str = "auto", *, channels_last: bool = True) -> Runtime:
    """The runtime that the settings mean on this machine. Raises InputError for a device that is not there."""
    found = find_device(device)
    return Runtime(found, find_precision(precision, found), channels_last)


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device '{name}'; give auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name} is not supported; give auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not there: PyTorch sees no Apple GPU; try --device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; try --device auto"
        )
    return device


def find_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in native) else "fp32"


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """What a run's env.json says of the machine."""
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


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
