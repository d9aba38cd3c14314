"""The variables that torchrun sets in the environment of this process."""

from __future__ import annotations

import os


def own_rank() -> int:
    """Return which process of `torchrun` this is, also before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def rank_count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return which process of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """Return how many processes of this machine train together."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def restarts() -> int:
    """Return how often torchrun has begun this process anew. Each machine counts by itself."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
