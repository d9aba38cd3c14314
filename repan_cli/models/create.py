"""From the name that a person typed, or from a file that repan wrote, to a network."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from repan_cli import checkpoint
from repan_cli.blocks import FAMILIES, rep_blocks, reparameterize
from repan_cli.checkpoint import FUSED, MULTI_BRANCH, PLAIN, Checkpoint
from repan_cli.errors import InputError
from repan_cli.models import repvgg_cifar
from repan_cli.registry import did_you_mean

OURS: tuple[str, ...] = tuple(repvgg_cifar.default_cfgs)
"""The networks of this package."""

SMALL_IMAGE = 64
"""Up to this side in pixels a short name means our network for small images, above it timm's."""

TIMM = "timm:"
ALIASES = {"repvgg": "repvgg_a1"}


def resolve(name: str, image_size: int) -> str:
    """The full name that `name` means for images of `image_size` pixels: one of `OURS`, or timm's as `timm:NAME`.

    `timm:NAME` is exactly timm's; `repvgg` is `repvgg_a1`; on small images `NAME_cifar` is preferred where it exists.
    Raises InputError, with the closest names, for one that does not exist.
    """
    if name.startswith(TIMM):
        return _known(name, [TIMM + known for known in timm.list_models()])
    full = ALIASES.get(name, name)
    if image_size <= SMALL_IMAGE and f"{full}_cifar" in OURS:
        return f"{full}_cifar"
    if full in OURS:
        return full
    return TIMM + _known(full, list(dict.fromkeys([*ALIASES, *OURS, *timm.list_models()])))


def _known(name: str, choices: list[str]) -> str:
    if name not in choices:
        raise InputError(f"unknown model '{name}'{did_you_mean(name, choices) or '; repan list models shows all'}")
    return name


def create(name: str, *, block: str, num_classes: int, in_chans: int) -> nn.Module:
    """A freshly initialised network by its full name, as `resolve` gives it.

    Our networks are built of blocks of the family `block`; timm's are as timm builds them.
    """
    FAMILIES[block]  # an unknown family is an error for every network
    kwargs = {"block": block} if name in OURS else {}
    return timm.create_model(name.removeprefix(TIMM), num_classes=num_classes, in_chans=in_chans, **kwargs)


def form_of(model: nn.Module) -> str:
    """What `meta["form"]` says of a network that was not fused: multi-branch, or plain when no block has a side
    branch.
    """
    return MULTI_BRANCH if any(len(block.branches) for _, block in rep_blocks(model)) else PLAIN


def rebuild(saved: Checkpoint, source: str) -> nn.Module:
    """The network in a checkpoint, multi-branch or fused as it was saved, on the CPU in eval mode.

    `source` names the file in errors. Raises InputError when the weights do not fit the network that the file
    describes.
    """
    meta = saved.meta
    model = create(meta["model"], block=meta["block"], num_classes=len(meta["classes"]), in_chans=meta["in_chans"])
    if meta["form"] == FUSED:
        reparameterize(model)
    checkpoint.load_weights(model, saved, source)
    return model.eval()


def load(path: str | Path) -> nn.Module:
    """A ready network from any file repan wrote, in eval mode on the CPU."""
    return rebuild(checkpoint.load(path), str(path))
