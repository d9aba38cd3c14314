"""Describe the shape that all branches of a block share, and the part of the input that a smaller kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.blocks.kernel import Size, size_of

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True)
class Geometry:
    """The shape of a block's trunk convolution, which all its branches share. Sizes are (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Size = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Return the geometry of a convolution. Raises ValueError if its padding is not numeric and symmetric."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            size_of(conv.kernel_size),
            size_of(conv.stride),
            _numeric_padding(conv),
            size_of(conv.dilation),
            conv.groups,
            conv.padding_mode,
        )

    @property
    def keeps_shape(self) -> bool:
        """Return whether the identity can be a branch of this block: equal numbers of channels, and stride 1."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)

    @property
    def depthwise(self) -> bool:
        """Return whether every group reads one channel."""
        return self.groups == self.in_channels > 1

    def center(self, kernel_size: Size) -> Size:
        """Return the offset of a small kernel in the middle of the trunk's: the tap (k - 1) // 2."""
        return size_of(
            (outer - 1) // 2 - (inner - 1) // 2 for outer, inner in zip(self.kernel_size, kernel_size, strict=True)
        )

    def offset_of(self, padding: Size) -> Size:
        """Return the offset in the trunk's kernel of a small kernel with its own `padding` p': (p - p') / d.

        Raises ValueError if that is not a tap of the trunk's kernel.
        """
        rows = [divmod(p - own, d) for p, own, d in zip(self.padding, padding, self.dilation, strict=True)]
        if any(rest or tap < 0 for tap, rest in rows):
            raise ValueError(f"a branch with padding {padding} falls between the taps of its trunk")
        return size_of(tap for tap, _ in rows)

    def output_size(self, input_size: Size) -> Size:
        """Return height and width of the block's output for an input of `input_size`."""
        return size_of(
            _outputs(*row)
            for row in zip(input_size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        )


def _numeric_padding(conv: nn.Conv2d) -> Size:
    """Return a convolution's padding in pixels. Raises ValueError if its two sides differ."""
    if not isinstance(conv.padding, str):
        return size_of(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(reach % 2 for reach in total):
        raise ValueError("its padding 'same' is larger on one side than on the other")
    return size_of(reach // 2 for reach in total)


def _outputs(size: int, padding: int, dilation: int, kernel: int, stride: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class Window(nn.Module):
    """Cut out the part of the trunk's *padded* input that a small kernel reads, with its first tap on the tap `offset`.

    In every dimension it is the slice `[o * d : o * d + (H_out - 1) * s + d * (k - 1) + 1]`. A convolution without
    padding then gives exactly the block's output size, for any kernel size, stride, dilation and padding.
    """

    def __init__(self, geometry: Geometry, kernel_size: Size, offset: Size) -> None:
        super().__init__()
        self.geometry, self.kernel_size, self.offset = geometry, kernel_size, offset

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        sides: list[int] = []
        for axis, outputs in enumerate(geometry.output_size(size_of(x.shape[-2:]))):
            start = self.offset[axis] * geometry.dilation[axis] - geometry.padding[axis]
            reach = (outputs - 1) * geometry.stride[axis] + geometry.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            sides = [-start, start + reach - x.shape[-2 + axis], *sides]
        if geometry.padding_mode != "zeros":
            x, sides = self._padded_as_trunk(x, sides)
        return F.pad(x, sides) if any(sides) else x

    def _padded_as_trunk(self, x: Tensor, sides: list[int]) -> tuple[Tensor, list[int]]:
        rows, columns = self.geometry.padding
        padding = [columns, columns, rows, rows]
        padded = F.pad(x, padding, mode=self.geometry.padding_mode)
        return padded, [side - already for side, already in zip(sides, padding, strict=True)]


def window_at(geometry: Geometry, kernel_size: Size, offset: Size) -> tuple[nn.Module, Size]:
    """Return how a small kernel at `offset` reads its input: a window, and the padding that the convolution adds.

    A kernel in the middle of the trunk's needs no window: the convolution's own padding p - o * d does the same at less
    cost.
    """
    padding = size_of(p - o * d for p, o, d in zip(geometry.padding, offset, geometry.dilation, strict=True))
    middle = all(2 * o + k == size for o, k, size in zip(offset, kernel_size, geometry.kernel_size, strict=True))
    if middle and min(padding) >= 0:
        return nn.Identity(), padding
    return Window(geometry, kernel_size, offset), (0, 0)


def middle_window(geometry: Geometry) -> nn.Module:
    """Return the input of the middle tap of the trunk's kernel, which is the input of an identity branch."""
    window, padding = window_at(geometry, (1, 1), geometry.center((1, 1)))
    return window if padding == (0, 0) else Window(geometry, (1, 1), geometry.center((1, 1)))
