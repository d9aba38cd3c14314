"""Represent convolutions as sums over taps, so that chains and sums of linear layers become one convolution.

A map is `y[o] = sum over taps (r, c) of W(r, c) x[stride * o + (r, c)] + bias`. Outside of its input it reads zeros, or
what the padding mode `mode` gives. Every linear part of a block is such a map: a convolution, a BN in eval mode,
average pooling, padding, cropping, a factor per channel. No decision here depends on the values of weights, so networks
of the same structure merge in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repan_cli.blocks.kernel import Kernel, Size, size_of

Tap = tuple[int, int]


@dataclass(frozen=True)
class ConvMap:
    """A linear map of images, in float64 on the CPU.

    Attributes:
        taps: the weight of each offset (row, column) in pixels: (C_out, C_in / groups). With `groups` None it is one
            factor per channel, (C,), or one for all, ().
        bias: (C_out,), or None if the map has none by structure.
        excess: the size that padding adds minus the size that the kernel consumes, so that outputs = (inputs + excess -
            1) // stride + 1.
    """

    taps: dict[Tap, Tensor]
    bias: Tensor | None
    groups: int | None
    stride: Size
    excess: Size
    mode: str = "zeros"

    @property
    def reads_outside(self) -> bool:
        """Return whether the map may read beyond the borders of its input."""
        return any(map(self.reads_beyond, (0, 1)))

    def reads_beyond(self, axis: int) -> bool:
        """Return whether the map may read beyond the first or last row (axis 0) or column (axis 1) of its input."""
        places = [tap[axis] for tap in self.taps]
        return min(places) < 0 or self.excess[axis] + max(places) > 0

    @property
    def is_pointwise(self) -> bool:
        """Return whether every output reads only the pixel at its own position."""
        return [*self.taps] == [(0, 0)] and self.stride == (1, 1) and self.excess == (0, 0)

    @property
    def channels(self) -> int | None:
        """Return C_out; None if it equals the number of input channels."""
        weight = next(iter(self.taps.values()))
        return len(weight) if weight.ndim else None if self.bias is None or not self.bias.ndim else len(self.bias)


ONE = torch.ones((), dtype=torch.float64)
IDENTITY = ConvMap({(0, 0): ONE}, None, None, (1, 1), (0, 0))


def scaling(scale: Tensor, shift: Tensor | None = None) -> ConvMap:
    """Return the map of a factor and a shift for each channel: a BN in eval mode."""
    return ConvMap({(0, 0): scale}, shift, None, (1, 1), (0, 0))


def padded(rows: tuple[int, int], columns: tuple[int, int], mode: str = "zeros") -> ConvMap:
    """Return the map that pads (before, behind), or crops where a number is negative."""
    excess = (sum(rows), sum(columns))
    return ConvMap({(-rows[0], -columns[0]): ONE}, None, None, (1, 1), excess, mode)


def convolution(
    kernel: Kernel, *, bias: bool, groups: int | None, stride: Size, padding: Size, dilation: Size, mode: str = "zeros"
) -> ConvMap:
    """Return the map of a convolution with `kernel`; `bias` says whether it has a bias by structure.

    With `groups` None the weight is (1, 1, kh, kw), the same for every channel, as in pooling.
    """
    weight, shift = kernel
    size = size_of(weight.shape[2:])
    taps = {
        (row * dilation[0] - padding[0], column * dilation[1] - padding[1]): (
            weight[0, 0, row, column] if groups is None else weight[:, :, row, column]
        )
        for row in range(size[0])
        for column in range(size[1])
    }
    excess = size_of(2 * p - d * (k - 1) for p, d, k in zip(padding, dilation, size, strict=True))
    depthwise = groups is not None and weight.shape[1] == 1 and groups == weight.shape[0] > 1
    if depthwise:
        taps, groups = {tap: value[:, 0] for tap, value in taps.items()}, None
    return ConvMap(taps, shift if bias else None, groups, stride, excess, mode)


# ---------------------------------------------------------------------------------------------- one after another


def behind(first: ConvMap, second: ConvMap) -> ConvMap:
    """Return the map of `second` applied to the output of `first`.

    Raises ValueError if no convolution equals it: `second` pads with zeros, but `first` would give other values there.
    """
    mode = first.mode if first.reads_outside else second.mode
    if second.reads_outside:
        if second.mode != "zeros" and not first.is_pointwise:
            raise ValueError(f"it applies {second.mode} padding to the output of a layer that pads or strides")
        if second.mode == "zeros" and (not _is_zero_around(first, second) or first.bias is not None):
            raise ValueError("it pads with zeros the output of a layer with a kernel, BN or bias")
    groups = _shared(first.groups, second.groups)
    taps: dict[Tap, Tensor] = {}
    for (row, column), inner in first.taps.items():
        for (below, right), outer in second.taps.items():
            tap = (row + first.stride[0] * below, column + first.stride[1] * right)
            found = _product(inner, first.groups, outer, second.groups, groups)
            taps[tap] = taps[tap] + found if tap in taps else found
    return ConvMap(
        taps,
        _bias_behind(first, second),
        groups,
        size_of(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        size_of(d + s * e for d, s, e in zip(first.excess, first.stride, second.excess, strict=True)),
        mode,
    )


def _is_zero_around(first: ConvMap, second: ConvMap) -> bool:
    """Return whether a map without its bias gives zeros at the places that another map reads beyond its borders."""
    axes = [axis for axis in (0, 1) if second.reads_beyond(axis)]
    zero = all(tap[axis] <= 0 <= first.excess[axis] + tap[axis] for tap in first.taps for axis in axes)
    return zero and not (first.reads_outside and first.mode != "zeros")


def _bias_behind(first: ConvMap, second: ConvMap) -> Tensor | None:
    if first.bias is None:
        return second.bias
    total = sum(second.taps.values())
    assert isinstance(total, Tensor)
    if second.groups is None:
        found = total * first.bias
    else:
        width = total.shape[1]
        inner = first.bias.expand(second.groups * width).unflatten(0, (second.groups, width))
        found = torch.einsum("gom,gm->go", total.unflatten(0, (second.groups, -1)), inner).flatten()
    return found if second.bias is None else found + second.bias


def _shared(one: int | None, other: int | None) -> int | None:
    """Return the number of groups in which both maps can be written; None stands for a factor per channel."""
    if one is None or other is None:
        return other if one is None else one
    return math.gcd(one, other)


def _product(inner: Tensor, of_inner: int | None, outer: Tensor, of_outer: int | None, groups: int | None) -> Tensor:
    """Return the weight of one tap applied after another, in `groups`."""
    if of_inner is None and of_outer is None:
        return inner * outer
    if of_outer is None:
        return inner * (outer.unsqueeze(1) if outer.ndim else outer)
    if of_inner is None:
        if not inner.ndim:
            return outer * inner
        width = outer.shape[1]
        rows = inner.unflatten(0, (of_outer, width)).repeat_interleave(len(outer) // of_outer, 0)
        return outer * rows
    assert groups is not None and of_inner is not None
    left = regrouped(outer, of_outer, groups).unflatten(0, (groups, -1))
    right = regrouped(inner, of_inner, groups).unflatten(0, (groups, -1))
    return torch.bmm(left, right).flatten(0, 1)


def regrouped(weight: Tensor, groups: int, wanted: int) -> Tensor:
    """Write (C_out, C_in / groups) in fewer groups, with zeros between. `wanted` must divide `groups`."""
    if groups == wanted:
        return weight
    each = groups // wanted
    outputs, width = len(weight) // groups, weight.shape[1]
    wide = weight.new_zeros(len(weight), width * each)
    for group in range(groups):
        column = group % each * width
        wide[group * outputs : (group + 1) * outputs, column : column + width] = weight[
            group * outputs : (group + 1) * outputs
        ]
    return wide


# ---------------------------------------------------------------------------------------------- side by side


def added(maps: Iterable[tuple[ConvMap, float]]) -> ConvMap:
    """Return the sum of several maps, each with a factor. Raises ValueError if strides or padding modes differ."""
    rows = [*maps]
    if len({each.stride for each, _ in rows}) > 1:
        raise ValueError("its branches have different strides")
    modes = {each.mode for each, _ in rows if each.reads_outside}
    if len(modes) > 1:
        raise ValueError(f"its branches pad in different ways: {', '.join(sorted(modes))}")
    channels = next((found for each, _ in rows if (found := each.channels) is not None), None)
    groups: int | None = None
    for each, _ in rows:
        groups = _shared(groups, each.groups)
    taps: dict[Tap, Tensor] = {}
    bias: Tensor | None = None
    for each, factor in rows:
        if each.bias is not None:
            bias = factor * each.bias if bias is None else bias + factor * each.bias
        for tap, weight in each.taps.items():
            part = factor * _in_groups(weight, each.groups, groups, channels)
            taps[tap] = taps[tap] + part if tap in taps else part
    excess = size_of(max(each.excess[axis] for each, _ in rows) for axis in (0, 1))
    return ConvMap(taps, bias, groups, rows[0][0].stride, excess, next(iter(modes), "zeros"))


def _in_groups(weight: Tensor, groups: int | None, wanted: int | None, channels: int | None) -> Tensor:
    if wanted is None:
        return weight
    if groups is not None:
        return regrouped(weight, groups, wanted)
    if channels is None or channels % wanted:
        raise ValueError("one of its branches has a different number of channels")
    index = torch.arange(channels)
    wide = weight.new_zeros(channels, channels // wanted)
    wide[index, index % (channels // wanted)] = weight
    return wide


# ---------------------------------------------------------------------------------------------- as a layer


@torch.no_grad()
def as_convolution(found: ConvMap, *, make: Callable[..., nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Return a map as a layer, in float64, always with a bias. `make` is called as `nn.Conv2d`.

    PyTorch pads both sides equally. If a map needs more padding on one side, its kernel gains zeros. Raises ValueError
    for a map whose number of channels is unknown.
    """
    channels = found.channels
    if channels is None:
        raise ValueError("it has no weights")
    groups = channels if found.groups is None else found.groups
    axes = [_axis(sorted({tap[axis] for tap in found.taps}), found.excess[axis]) for axis in (0, 1)]
    (top, padding_y, dilation_y, height), (left, padding_x, dilation_x, width) = axes
    weights = {
        tap: value.expand(channels).unsqueeze(1) if found.groups is None else value for tap, value in found.taps.items()
    }
    inner = next(iter(weights.values())).shape[1]
    kernel = torch.zeros(channels, inner, height, width, dtype=torch.float64)
    for (row, column), value in weights.items():
        kernel[:, :, (row - top) // dilation_y, (column - left) // dilation_x] = value
    conv = make(
        inner * groups,
        channels,
        (height, width),
        stride=found.stride,
        padding=(padding_y, padding_x),
        dilation=(dilation_y, dilation_x),
        groups=groups,
        padding_mode=found.mode if padding_y or padding_x else "zeros",
        dtype=torch.float64,
    )
    conv.weight.copy_(kernel)
    assert conv.bias is not None, "it was made with one"
    conv.bias.copy_(torch.zeros(channels, dtype=torch.float64) if found.bias is None else found.bias)
    return conv


def _axis(offsets: list[int], excess: int) -> tuple[int, int, int, int]:
    """Return first tap, padding, dilation and kernel size along one axis, of taps at `offsets`."""
    first, last = offsets[0], offsets[-1]
    padding = max(-first, excess + last, 0)
    start, end = -padding, padding - excess
    dilation = math.gcd(*(offset - start for offset in offsets), end - start) or 1
    return start, padding, dilation, (end - start) // dilation + 1


def size(found: ConvMap) -> int:
    """Return the number of weights, without bias, that a map has as a layer."""
    channels = found.channels or 0
    inner = 1 if found.groups is None else next(iter(found.taps.values())).shape[1]
    (*_, height), (*_, width) = (
        _axis(sorted({tap[axis] for tap in found.taps}), found.excess[axis]) for axis in (0, 1)
    )
    return channels * inner * height * width
