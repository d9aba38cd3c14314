"""Branches: the linear maps whose sum is a block, each of which equals one convolution in eval mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.blocks.kernel import Kernel, Size, conv_kernel, embed, fold_norm, identity_kernel


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
    padding_mode: str = "zeros"

    @property
    def keeps_shape(self) -> bool:
        """Whether the identity is a branch of this block: as many channels out as in, stride 1."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)

    def center(self, kernel_size: Size) -> Size:
        """The offset at which a small kernel lies in the middle of the trunk's, tap (k - 1) // 2."""
        return tuple(
            (outer - 1) // 2 - (inner - 1) // 2 for outer, inner in zip(self.kernel_size, kernel_size, strict=True)
        )

    def output_size(self, input_size: Size) -> Size:
        """Height and width of the block's output for an input of `input_size`."""
        return tuple(
            _outputs(*row)
            for row in zip(input_size, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        )


def _outputs(size: int, padding: int, dilation: int, kernel: int, stride: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class Window(nn.Module):
    """What a small kernel sees of the trunk's *padded* input when its first tap lies on the trunk's tap `offset`.

    In every dimension the slice `[o * d : o * d + (H_out - 1) * s + d * (k - 1) + 1]`, so that a convolution without
    padding on it gives exactly the block's output size, for any kernel size, stride, dilation and padding.
    """

    def __init__(self, geometry: Geometry, kernel_size: Size, offset: Size) -> None:
        super().__init__()
        self.geometry, self.kernel_size, self.offset = geometry, kernel_size, offset

    def forward(self, x: Tensor) -> Tensor:
        geometry, sides = self.geometry, []
        for axis, outputs in enumerate(geometry.output_size(x.shape[-2:])):
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


class Branch(Protocol):
    """What a block asks of its trunk and of each side branch."""

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H_out, W_out)."""

    def equivalent_kernel(self) -> Kernel:
        """The one convolution of the trunk's geometry that this equals in eval mode; float64, CPU."""

    def reset(self, init: str, generator: torch.Generator | None) -> None:
        """Make it fresh in place: new weights, gamma 1, beta 0, mean 0, variance 1."""

    def silence(self) -> None:
        """Make its output zero in train and eval mode, by the last gamma and beta, in place."""


def init_weight(weight: Tensor, init: str, generator: torch.Generator | None = None) -> None:
    """Fresh convolution weights in place: `kaiming` (normal, fan-out; He et al. 2015) or `small` (normal, std 0.01)."""
    drawn = torch.empty(weight.shape)  # on the CPU, so that a seed gives the same weights on every device
    if init == "small":
        nn.init.normal_(drawn, std=0.01, generator=generator)
    else:
        nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


def silence_norm(norm: nn.BatchNorm2d) -> None:
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)


def reset_norm(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def placed(geometry: Geometry, kernel_size: Size, offset: Size) -> tuple[nn.Module, Size]:
    """How a small kernel at `offset` reads its input: a window module and the padding the convolution adds itself.

    A kernel in the middle of the trunk's needs no window: the convolution's own padding p - o * d says the same,
    cheaper.
    """
    padding = tuple(p - o * d for p, o, d in zip(geometry.padding, offset, geometry.dilation, strict=True))
    middle = all(2 * o + k == size for o, k, size in zip(offset, kernel_size, geometry.kernel_size, strict=True))
    if middle and min(padding) >= 0:
        return nn.Identity(), padding
    return Window(geometry, kernel_size, offset), (0, 0)


class ConvBN(nn.Module):
    """A convolution and its BN: the trunk of a block, or a side branch with a smaller kernel.

    Without `kernel_size` it is the trunk's own; a smaller one lies in the middle unless `offset` (row, column) places
    it.
    """

    def __init__(self, geometry: Geometry, kernel_size: Size | None = None, offset: Size | None = None) -> None:
        super().__init__()
        kernel_size = kernel_size or geometry.kernel_size
        self.canvas = geometry.kernel_size
        self.offset = geometry.center(kernel_size) if offset is None else offset
        self.window, padding = placed(geometry, kernel_size, self.offset)
        self.conv = nn.Conv2d(
            geometry.in_channels,
            geometry.out_channels,
            kernel_size,
            stride=geometry.stride,
            padding=padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            bias=False,
            padding_mode=geometry.padding_mode,
        )
        self.norm = nn.BatchNorm2d(geometry.out_channels)
        self.reset("kaiming")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.window(x)))

    def equivalent_kernel(self) -> Kernel:
        return embed(fold_norm(conv_kernel(self.conv), self.norm), self.canvas, self.offset)

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        init_weight(self.conv.weight, init, generator)
        reset_norm(self.norm)

    def silence(self) -> None:
        silence_norm(self.norm)


class IdentityBN(nn.Module):
    """The block's input through a BN of its own; for blocks that keep the shape."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        assert geometry.keeps_shape
        self.geometry = geometry
        window, padding = placed(geometry, (1, 1), geometry.center((1, 1)))
        self.window = window if padding == (0, 0) else Window(geometry, (1, 1), geometry.center((1, 1)))
        self.norm = nn.BatchNorm2d(geometry.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.window(x))

    def equivalent_kernel(self) -> Kernel:
        identity = identity_kernel(self.geometry.in_channels, self.geometry.groups)
        return embed(fold_norm(identity, self.norm), self.geometry.kernel_size, self.geometry.center((1, 1)))

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        reset_norm(self.norm)

    def silence(self) -> None:
        silence_norm(self.norm)
