"""RepAn: train re-parameterizable networks in annealing cycles, then merge them into plain ones.

Importing this package is light: torch is loaded at the first use of one of the names below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repan_cli.anneal.restart import restart
    from repan_cli.blocks import register_block, reparameterize, set_attach_rate
    from repan_cli.door import Summary, cycle, distill, train
    from repan_cli.export.fuse import fuse
    from repan_cli.models.expand import expand
    from repan_cli.models.rebuild import load

__version__ = "0.2.0"

_DOORS = {
    "Summary": "repan_cli.door",
    "cycle": "repan_cli.door",
    "distill": "repan_cli.door",
    "expand": "repan_cli.models",
    "fuse": "repan_cli.export",
    "load": "repan_cli.models",
    "register_block": "repan_cli.blocks",
    "reparameterize": "repan_cli.blocks",
    "restart": "repan_cli.anneal.restart",
    "set_attach_rate": "repan_cli.blocks",
    "train": "repan_cli.door",
}

__all__ = [
    "Summary",
    "__version__",
    "cycle",
    "distill",
    "expand",
    "fuse",
    "load",
    "register_block",
    "reparameterize",
    "restart",
    "set_attach_rate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
