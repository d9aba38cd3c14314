"""Randomness keyed by position, such as (seed, cycle, epoch), instead of by generator state."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, such as (seed, cycle, epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by position: the same draws whatever ran before."""
    return torch.Generator().manual_seed(seed_for(*parts))
