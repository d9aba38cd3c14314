"""Read linear functions of images, with the arguments of a call, as convolutions over taps.

All raise ValueError, with the reason, if the arguments make the function something else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repan_cli.blocks.affine import ConvMap, convolution, padded, scaling
from repan_cli.blocks.kernel import Size, exact, size_of

SIDES = 4
"""Dimensions of a batch of images."""

Arguments = dict[str | int, Any]
"""The arguments of a call by name, or by position if they have no name; the images themselves are None."""

MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def of_channels(value: Any) -> Tensor:
    """Return a number, or one for each channel (C,). Raises ValueError for any other tensor."""
    if not isinstance(value, (int, float, Tensor)):
        raise ValueError("it uses a value that is not a number")
    tensor = exact(value) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if tensor.numel() == 1 and tensor.ndim <= SIDES:
        return tensor.reshape(())
    shape = (1,) * (SIDES - tensor.ndim) + tuple(tensor.shape)
    if len(shape) != SIDES or shape[0] != 1 or shape[2:] != (1, 1):
        raise ValueError(f"it calculates with a tensor of shape {tuple(tensor.shape)}, not one number per channel")
    return tensor.flatten()


def _pair(value: Any) -> Size:
    if isinstance(value, int):
        return value, value
    numbers = [int(each) for each in value]
    return size_of(numbers * 2 if len(numbers) == 1 else numbers)


def _convolution(given: Arguments) -> ConvMap:
    weight, bias = exact(given["weight"]), given.get("bias")
    if weight.ndim != SIDES:
        raise ValueError("it is not a convolution of images")
    padding, dilation = given.get("padding", 0), _pair(given.get("dilation", 1))
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(reach % 2 for reach in total):
            raise ValueError("its padding 'same' is larger on one side than on the other")
        padding = [reach // 2 for reach in total] if padding == "same" else 0
    shift = weight.new_zeros(len(weight)) if bias is None else exact(bias)
    return convolution(
        (weight, shift),
        bias=bias is not None,
        groups=given.get("groups", 1),
        stride=_pair(given.get("stride", 1)),
        padding=_pair(padding),
        dilation=dilation,
    )


def _norm(given: Arguments) -> ConvMap:
    if given.get("training") or given.get("running_mean") is None:
        raise ValueError("its BN keeps no running statistics, or is used in train mode")
    scale = 1 / torch.sqrt(exact(given["running_var"]) + given.get("eps", 1e-5))
    if given.get("weight") is not None:
        scale = scale * exact(given["weight"])
    shift = -exact(given["running_mean"]) * scale
    return scaling(scale, shift if given.get("bias") is None else shift + exact(given["bias"]))


def average(given: Arguments) -> ConvMap:
    kernel, padding = _pair(given["kernel_size"]), _pair(given.get("padding", 0))
    stride = _pair(given.get("stride") or kernel)
    if given.get("ceil_mode"):
        raise ValueError("its average pooling rounds sizes up (ceil_mode)")
    if any(padding) and not given.get("count_include_pad", True):
        raise ValueError("its average pooling leaves the padding out (count_include_pad=False)")
    area = given.get("divisor_override") or kernel[0] * kernel[1]
    weight = torch.full((1, 1, *kernel), 1 / area, dtype=torch.float64)
    return convolution(
        (weight, weight.new_zeros(())),
        bias=False,
        groups=None,
        stride=stride,
        padding=padding,
        dilation=(1, 1),
    )


def padding_of(given: Arguments) -> ConvMap:
    sides = [int(each) for each in given["pad"]]
    mode = MODES.get(given.get("mode", "constant"))
    if len(sides) not in (2, SIDES) or mode is None or given.get("value") not in (None, 0, 0.0):
        raise ValueError("it pads with something other than zeros, or other dimensions")
    left, right, top, bottom = [*sides, 0, 0][:SIDES]
    if mode != "zeros" and min(sides) < 0:
        raise ValueError("it pads and crops at once")
    return padded((top, bottom), (left, right), mode)


def _slice(given: Arguments) -> ConvMap:
    """Read `x[:, :, a:b, c:d]`, with steps."""
    index = given[1] if isinstance(given[1], tuple) else (given[1],)
    if index[:1] == (Ellipsis,) and len(index) == 3:
        index = (slice(None), slice(None), *index[1:])
    index = (*index, *[slice(None)] * (SIDES - len(index)))
    everything = slice(None)
    if len(index) != SIDES or index[0] != everything or index[1] != everything:
        raise ValueError("it takes a part of the channels or images")
    rows, steps = zip(*map(_cut, index[2:]), strict=True)
    taps = {(rows[0][0], rows[1][0]): torch.ones((), dtype=torch.float64)}
    excess = size_of(-start - end for start, end in rows)
    return ConvMap(taps, None, None, size_of(steps), excess)


def _cut(each: Any) -> tuple[tuple[int, int], int]:
    """Return the numbers of rows or columns that a slice removes at the start and at the end, and its step."""
    if not isinstance(each, slice):
        raise ValueError("it takes single rows or columns")
    start, stop, step = each.start or 0, each.stop, each.step or 1
    if start < 0 or step < 1 or (stop is not None and stop >= 0):
        raise ValueError("it cuts at a place that depends on the size")
    return (start, -(stop or 0)), step


FUNCTIONS: tuple[tuple[tuple[Any, ...], Callable[[Arguments], ConvMap]], ...] = (
    ((F.conv2d, torch.conv2d), _convolution),
    ((F.batch_norm, torch.batch_norm), _norm),
    ((F.avg_pool2d,), average),
    ((F.pad, torch.nn.functional.pad), padding_of),
    ((operator.getitem,), _slice),
)
OF_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
OF_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
NAMES: dict[Any, tuple[str, ...]] = {
    F.conv2d: OF_CONV,
    torch.conv2d: OF_CONV,
    F.avg_pool2d: OF_POOL,
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.pad: ("input", "pad", "mode", "value"),
    F.dropout: ("input", "p", "training", "inplace"),
    F.dropout2d: ("input", "p", "training", "inplace"),
    torch.dropout: ("input", "p", "training"),
}
