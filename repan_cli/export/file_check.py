"""Check the network in a written file against the network that it was written from, in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from repan_cli.models.outputs import all_leaves, difference

TOLERANCE, WRONG = 1e-4, 1e-2
"""The limit on the relative error of a file's network; if ten times the network's own rounding is larger, that is the
limit, but at most the error of a wrong file.
"""

ROUNDING = 1e-6
"""A relative change of images that has the size of another program's rounding."""


def bound(own: float) -> float:
    """Return the allowed error of a file's network, by the network's own rounding in float32.

    That is infinite for a detector that finds another number of things in float32, which says nothing about a file.
    """
    return max(TOLERANCE, min(10 * own, WRONG)) if math.isfinite(own) else TOLERANCE


@torch.no_grad()
def error_of(written: nn.Module, given: Tensor, network: nn.Module, images: Tensor, expected: tuple[Any, Any]) -> float:
    """Return the largest relative error of a file's network, for all images at once and for the first one.

    If the file takes one image at a time, for each image.

    Args:
        written: the file's network.
        given: the images as the file takes them.
        network: the network that it was written from.
        images: the images as this network takes them.
        expected: its outputs for all images, and for the first one.
    """
    if takes_one(written):
        singles = zip(given.split(1), images.split(1), strict=True)
        pairs = [(written(one), network(image)) for one, image in singles]
    else:
        pairs = [(written(given), expected[0]), (written(given[:1]), expected[1])]
    return max(difference(all_leaves(found), all_leaves(wanted)) for found, wanted in pairs)


@torch.no_grad()
def why_different(written: nn.Module, network: nn.Module, images: Tensor, allowed: float) -> str:
    """Return the reason why a detector cannot be compared, for a message; '' if its results do not jump."""
    if not takes_one(written):
        return ""
    pairs = [(network(image), network(image * (1 + ROUNDING))) for image in images.split(1)]
    jump = max(difference(all_leaves(changed), all_leaves(found)) for found, changed in pairs)
    if jump <= allowed:
        return ""
    return (
        f" (its own results change by {jump:.1e} when the images change by {ROUNDING:g}, because scores nearly tie, as "
        "before training; raise its score threshold)"
    )


def takes_one(written: nn.Module) -> bool:
    """Return whether a file's network takes one image at a time, and returns a number of results that depends on it."""
    return bool(getattr(written, "one_by_one", False))
