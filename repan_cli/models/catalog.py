"""Tell the size of each network of timm or torchvision, and its use: train in cycles, fuse, or neither.

The table `catalog.csv` next to this file was made by `python -m repan_cli.models.catalog`, and serves completion. A
name that it lacks is examined when it is asked for: the network is built on the meta device and one forward pass is
watched, which costs no arithmetic.
"""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from repan_cli.blocks import RepBlock
from repan_cli.config.conventions import LARGE_IMAGE
from repan_cli.config.names import TIMM, TORCHVISION, Support, foreign
from repan_cli.models.changes import Selection
from repan_cli.models.create import BUILTIN, WITH_AUXILIARY_HEADS
from repan_cli.models.expand import to_expand
from repan_cli.models.probe import watch
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.system.notices import warn

TABLE = Path(__file__).with_name("catalog.csv")


def look(name: str) -> Support:
    """Build a network on the meta device and watch it run."""
    model, size, channels = _on_meta(name)
    model.eval()
    own = sum(1 for module in model.modules() if is_own_block(module) or isinstance(module, RepBlock))
    images = torch.empty(2, channels, size, size, device="meta")
    with torch.no_grad():
        changes, _ = to_expand(model, watch(model, images), "rep", Selection())
        pairs = sum(1 for norms in watch(model, images, trains=False).norms.values() if norms)
    return Support(own, len(changes), pairs, sum(parameter.numel() for parameter in model.parameters()))


def _on_meta(name: str) -> tuple[nn.Module, int, int]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith(TORCHVISION):
            short = name.removeprefix(TORCHVISION)
            main = {"aux_logits": False} if short in WITH_AUXILIARY_HEADS else {}
            model = torchvision.models.get_model(short, weights=None, **main)
            return model, 299 if "inception" in name else LARGE_IMAGE, 3
        if name in BUILTIN:
            return timm.create_model(name), 32, 3
        known = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        channels, size, _ = known.input_size if known else (3, LARGE_IMAGE, LARGE_IMAGE)
        return timm.create_model(name.removeprefix(TIMM)), size, channels


def _rows() -> Iterator[tuple[str, int, int, int, int]]:
    logging.getLogger("timm").setLevel(logging.ERROR)
    for name in (*BUILTIN, *foreign()):
        try:
            yield (name, *look(name))
        except Exception as error:
            warn(f"{name}: {type(error).__name__}: {error}"[:150])


if __name__ == "__main__":
    with TABLE.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target, lineterminator="\n").writerows(_rows())
