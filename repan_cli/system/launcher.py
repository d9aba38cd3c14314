"""What torchrun says of this process in its environment."""

from __future__ import annotations

import os


def own_rank() -> int:
    """Return which process of `torchrun` this is, also before it has joined the others."""
    return int(os.environ.get("RANK", "0"))
