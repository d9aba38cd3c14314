"""Derive random numbers from a position, such as (seed, cycle, epoch), instead of from a generator's state."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, such as (seed, cycle, epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of a device.

    `torch.manual_seed` has the same effect. But it seeds every kind of device, and formats a stack trace for each kind
    that is missing, which takes 0.1 ms per step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by position: the draws do not depend on what ran before."""
    return torch.Generator().manual_seed(seed_for(*parts))
