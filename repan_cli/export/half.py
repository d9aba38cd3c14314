"""Convert to float16: an ONNX model of half the size, and the cost of its rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repan_cli.errors import InputError
from repan_cli.export.trace import quiet
from repan_cli.models.outputs import relative_error
from repan_cli.system.packages import need
from repan_cli.system.text import first_line

TOLERANCE = 1e-2
"""The limit on the relative error of a file in float16; if ten times the network's own rounding is larger, that is the
limit. Rounding is 5e-4 per number.
"""


@dataclass(frozen=True)
class HalfReport:
    """The cost of float16: the relative error of the logits, and the share of images that get the same class.

    `real` is true if the images come from a data set, false for noise.
    """

    rel_error: float
    top1_agreement: float
    images: int
    real: bool


def as_half(model: Any) -> Any:
    """Return an ONNX model with weights and arithmetic in float16; input and output stay float32."""
    need("float16", "onnx", "onnxruntime")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        with quiet():
            return convert_float_to_float16(model, keep_io_types=True)
    except Exception as error:
        raise InputError(f"cannot be written in float16: {first_line(error)}") from error


@torch.no_grad()
def compare(half: nn.Module, network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, real: bool) -> HalfReport:
    """Compare a network in float16 with the one in float32, each on images in its own precision."""
    pairs = [(half(given), network(images)) for given, images in batches]
    found, expected = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    return HalfReport(relative_error(found, expected), same, len(found), real)


@torch.no_grad()
def bound(network: nn.Module, images: Tensor, name: str) -> float:
    """Return the allowed relative error of a file in float16, based on the network's own error in PyTorch.

    Raises InputError if the network returns no logits, or if numbers in it exceed 65,504, the largest in float16. A
    processor that computes in float32 hides that; others give infinities.
    """
    expected = network(images)
    if not isinstance(expected, Tensor):
        raise InputError(f"{name} returns a {type(expected).__name__}, and float16 is measured on logits: omit --half")
    try:
        found = copy.deepcopy(network).half()(images.half()).float()
    except RuntimeError:  # an operator that PyTorch lacks in float16 on CPUs
        return TOLERANCE
    if not found.isfinite().all():
        raise InputError(f"{name} computes numbers beyond 65504, the largest of float16: write it in float32")
    return max(TOLERANCE, 10 * relative_error(found, expected))
