"""Copy networks without copying their tensors, to observe a network without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.system.copies import deep_copy, modules_of

Found = TypeVar("Found")

SIDE, STEP = 64, 32
"""Images with longer sides are cropped to at least `SIDE` pixels, in steps of `STEP`, the total stride of most
networks. So all their maps stay odd or even.
"""


def without_arithmetic(model: nn.Module, images: Tensor, look: Callable[[nn.Module, Tensor], Found]) -> Found:
    """Return the result of `look` for a network, with blocks as convolutions, and images.

    It runs on the meta device if possible, else with arithmetic.
    """
    try:
        return look(twin(model, "meta", blocks=_as_convolution), images.to("meta"))
    except Exception:  # anything may be raised for tensors without data
        return look(twin(model, blocks=RepBlock.reparameterize), images)


def _as_convolution(block: RepBlock) -> nn.Module:
    """Return a convolution on the meta device with the shape of a block's convolution."""
    conv = block.trunk.conv
    shape = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    size = (conv.in_channels, conv.out_channels, conv.kernel_size)
    plain = nn.Conv2d(*size, **shape, padding_mode=conv.padding_mode, device="meta", dtype=conv.weight.dtype)  # type: ignore[arg-type]
    return plain.train(block.training)


def twin(
    model: nn.Module, device: str | None = None, *, blocks: Callable[[RepBlock], nn.Module] | None = None
) -> nn.Module:
    """Return a copy of a network on the same tensors, or with tensors of the same shapes on another device.

    `blocks` gives the module that replaces each block.
    """
    memo: dict[int, Any] = {}
    if blocks is not None:
        memo |= {id(block): blocks(block) for _, block in rep_blocks(model)}
    for module in modules_of(model, memo):
        for values in (module._parameters, module._buffers, vars(module)):
            for each in values.values():
                if isinstance(each, Tensor) and id(each) not in memo:
                    memo[id(each)] = each if device is None else _moved(each, device)
    return deep_copy(model, memo)


def _moved(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@torch.no_grad()
def cut(model: nn.Module, images: Tensor) -> Tensor:
    """Return the middle of large images (N, C, H, W) if the network runs on it, else the images.

    It shows the same about convolutions in a twelfth of the time that 224 pixels take.
    """
    height, width = ((side - SIDE) % STEP + SIDE if side > SIDE else side for side in images.shape[-2:])
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    middle = images[..., top : top + height, left : left + width]
    if middle.shape == images.shape:
        return images
    try:
        without_arithmetic(model, middle[:1], lambda net, some: net(some))
    except Exception:  # a network may raise anything for images of another size
        return images
    return middle
