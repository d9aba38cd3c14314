"""Read the variables that torchrun sets in the environment of this process."""

from __future__ import annotations

import os


def own_rank() -> int:
    """Return the global rank of this process of `torchrun`, also before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def rank_count() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """Return the number of processes of this machine that train together."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def restarts() -> int:
    """Return the number of times that torchrun has restarted this process. Each machine counts separately."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
