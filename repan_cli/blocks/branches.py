"""Define branches: the linear maps whose sum is a block. Each equals one convolution in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.blocks.geometry import Geometry, Window, middle_window, window_at
from repan_cli.blocks.kernel import (
    BatchNorm,
    Kernel,
    Size,
    averaged,
    compose,
    conv_kernel,
    embed,
    exact,
    fold_norm,
    identity_kernel,
    running_stats,
)

FEW_CHANNELS = 16
"""With fewer input channels, the input of a strided 1x1 kernel is cropped; see `_reached`."""


# ---------------------------------------------------------------------------------------------- what a block asks


class Branch(Protocol):
    """The interface of the trunk and the side branches of a block, all of which are modules."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yield the module itself and all modules inside it."""
        ...

    def equivalent_kernel(self) -> Kernel:
        """Return the convolution, with the trunk's geometry, that equals the branch in eval mode; float64, CPU."""
        ...

    def reset(self, init: str, generator: torch.Generator | None) -> None:
        """Reset the branch in place: new weights, gamma 1, beta 0, mean 0, variance 1."""

    def zero_init(self) -> None:
        """Make the branch's output zero in train and eval mode, by its last gamma and beta or its weights, in place."""

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        """Choose gamma for the start of a fresh branch, in place. Its BN statistics are already those of its input.

        `kernel` (C_out, C_in/groups, kh, kw) is the block's own. `spread` (C_out,) is the standard deviation of the
        block's output. Both are in float64 on the CPU.
        """


def init_weight(weight: Tensor, init: str, generator: torch.Generator | None = None) -> None:
    """Fill convolution weights in place: `kaiming` (normal, fan-out; He et al. 2015) or `small` (normal, std 0.01)."""
    drawn = torch.empty(weight.shape)  # on the CPU, so that a seed gives the same weights on every device
    if init == "small":
        nn.init.normal_(drawn, std=0.01, generator=generator)
    else:
        nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


def zero_init_norm(norm: BatchNorm) -> None:
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)


def reset_norm(norm: BatchNorm) -> None:
    norm.reset_running_stats()
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


# ---------------------------------------------------------------------------------------------- branches


class ConvBN(nn.Module):
    """A convolution with or without a BN: the trunk of a block, or a side branch.

    Args:
        conv: the convolution, with the block's stride, dilation and groups.
        norm: its BN; None for a branch without.
        canvas: the kernel size of the block, which the equivalent kernel has.
        offset: the tap (row, column) of the trunk's kernel at which the first tap of this kernel lies.
        window: the part of the input that the convolution reads; None if its own padding defines that.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: BatchNorm | None,
        *,
        canvas: Size,
        offset: Size = (0, 0),
        window: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.canvas, self.offset = canvas, offset
        self.window = window or nn.Identity()
        self.conv = conv
        self.norm = norm or nn.Identity()

    @property
    def batch_norm(self) -> BatchNorm | None:
        """Return the BN if there is one."""
        return None if isinstance(self.norm, nn.Identity) else self.norm

    @property
    def has_norm(self) -> bool:
        return self.batch_norm is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(_reached(self.window(x), self.conv)))

    def equivalent_kernel(self) -> Kernel:
        kernel, norm = conv_kernel(self.conv), self.batch_norm
        return embed(kernel if norm is None else fold_norm(kernel, norm), self.canvas, self.offset)

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        init_weight(self.conv.weight, init, generator)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        if (norm := self.batch_norm) is not None:
            reset_norm(norm)

    def zero_init(self) -> None:
        if (norm := self.batch_norm) is not None:
            zero_init_norm(norm)
            return
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        if (norm := self.batch_norm) is not None:
            norm.weight.copy_(spread)


def _reached(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Crop the rows and columns of the input after the last step of a strided 1x1 convolution.

    Otherwise the weight gradient in PyTorch's CPU kernels writes outside of its memory, for few channels in
    channels-last format (seen in 2.15).
    """
    if conv.kernel_size != (1, 1) or conv.stride == (1, 1) or conv.in_channels >= FEW_CHANNELS or any(conv.padding):
        return x
    rows, columns = ((size - 1) // step * step + 1 for size, step in zip(x.shape[-2:], conv.stride, strict=True))
    return x[..., :rows, :columns]


def conv_bn(
    geometry: Geometry, kernel_size: Size | None = None, *, offset: Size | None = None, norm: bool = True
) -> ConvBN:
    """Build a fresh convolution, with a BN unless `norm` is false.

    By default it has the trunk's kernel size. A smaller kernel lies in the middle, unless `offset` (row, column) places
    it.
    """
    kernel_size = kernel_size or geometry.kernel_size
    offset = geometry.center(kernel_size) if offset is None else offset
    window, padding = window_at(geometry, kernel_size, offset)
    conv = nn.Conv2d(
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
    normed = nn.BatchNorm2d(geometry.out_channels) if norm else None
    branch = ConvBN(conv, normed, canvas=geometry.kernel_size, offset=offset, window=window)
    branch.reset("kaiming")
    return branch


class IdentityBN(nn.Module):
    """The block's input through its own BN, for blocks that keep the shape."""

    def __init__(self, geometry: Geometry, norm: BatchNorm | None = None) -> None:
        super().__init__()
        assert geometry.keeps_shape
        self.geometry = geometry
        self.window = middle_window(geometry)
        self.norm = norm or nn.BatchNorm2d(geometry.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.window(x))

    def equivalent_kernel(self) -> Kernel:
        identity = identity_kernel(self.geometry.in_channels, self.geometry.groups)
        return embed(fold_norm(identity, self.norm), self.geometry.kernel_size, self.geometry.center((1, 1)))

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        reset_norm(self.norm)

    def zero_init(self) -> None:
        zero_init_norm(self.norm)

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        """Absorb the identity part of a block."""
        row, column = self.geometry.center((1, 1))
        channels = torch.arange(self.geometry.in_channels)
        share = kernel[channels, channels % kernel.shape[1], row, column]
        _, var = running_stats(self.norm)
        self.norm.weight.copy_(share * torch.sqrt(exact(var) + self.norm.eps))


class ScaledIdentity(nn.Module):
    """The block's input times a learned factor per channel, 1 at first, for blocks that have no BN inside."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        assert geometry.keeps_shape
        self.geometry = geometry
        self.window = middle_window(geometry)
        self.weight = nn.Parameter(torch.ones(geometry.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.window(x)
        return x * self.weight.view(-1, 1, 1).to(x.dtype)

    def equivalent_kernel(self) -> Kernel:
        weight, bias = identity_kernel(self.geometry.in_channels, self.geometry.groups)
        scaled = weight * exact(self.weight).view(-1, 1, 1, 1)
        return embed((scaled, bias), self.geometry.kernel_size, self.geometry.center((1, 1)))

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.weight)

    def zero_init(self) -> None:
        nn.init.zeros_(self.weight)

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        """Start as the identity."""


class ResidualPointwise(nn.Conv2d):
    """A 1x1 convolution stored as the identity plus a learned difference, zeros at first (DBB, section 3.3)."""

    identity: Tensor

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__(
            geometry.in_channels,
            width,
            (1, 1),
            padding=geometry.padding,
            groups=geometry.groups,
            bias=False,
            padding_mode=geometry.padding_mode,
        )
        identity, _ = identity_kernel(geometry.in_channels, geometry.groups)
        copies = width // geometry.in_channels
        self.register_buffer("identity", identity.repeat_interleave(copies, 0).to(self.weight.dtype), persistent=False)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + self.identity, None)

    def kernel(self) -> Kernel:
        weight = exact(self.weight) + exact(self.identity)
        return weight, weight.new_zeros(len(weight))


class PointwiseConvBN(nn.Module):
    """1x1 + BN, then k x k + BN (DBB, Ding et al. 2021).

    The 1x1 convolution pads its input as the trunk does, and the k x k convolution has no padding. So the borders of
    the map between them hold what the first BN makes of zeros, in train mode as well as in eval mode.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.groups = geometry.groups
        width = geometry.in_channels * (2 if geometry.depthwise else 1)
        self.inner_conv = ResidualPointwise(geometry, width)
        self.inner_norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(
            width,
            geometry.out_channels,
            geometry.kernel_size,
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(geometry.out_channels)
        self.reset("kaiming")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.inner_norm(self.inner_conv(x))))

    def equivalent_kernel(self) -> Kernel:
        inner = fold_norm(self.inner_conv.kernel(), self.inner_norm)
        return fold_norm(compose(inner, conv_kernel(self.conv), self.groups), self.norm)

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.inner_conv.weight)
        init_weight(self.conv.weight, init, generator)
        reset_norm(self.inner_norm)
        reset_norm(self.norm)

    def zero_init(self) -> None:
        zero_init_norm(self.norm)

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        self.norm.weight.copy_(spread)


class PointwiseAverageBN(nn.Module):
    """1x1 + BN, then average pooling + BN (DBB); in a depthwise block that keeps its channels, without the 1x1 + BN.

    The average includes the padding, which the 1x1 convolution adds as in `PointwiseConvBN`. With dilation the pooling
    is a convolution with constant weights.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        channels = geometry.out_channels
        self.inner_conv: nn.Conv2d | None = None
        self.inner_norm: nn.BatchNorm2d | None = None
        if geometry.depthwise and geometry.in_channels == channels:
            self.window = Window(geometry, geometry.kernel_size, (0, 0))
        else:
            self.inner_conv = nn.Conv2d(
                geometry.in_channels,
                channels,
                (1, 1),
                padding=geometry.padding,
                groups=geometry.groups,
                bias=False,
                padding_mode=geometry.padding_mode,
            )
            self.inner_norm = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.reset("kaiming")

    def forward(self, x: Tensor) -> Tensor:
        inner = self._inner
        x = self.window(x) if inner is None else inner[1](inner[0](x))
        return self.norm(self._average(x))

    @property
    def _inner(self) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
        """Return the 1x1 convolution and its BN, if there are any."""
        if self.inner_conv is None or self.inner_norm is None:
            return None
        return self.inner_conv, self.inner_norm

    def _average(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        height, width = geometry.kernel_size
        if geometry.dilation == (1, 1):
            return F.avg_pool2d(x, geometry.kernel_size, geometry.stride)
        weight = x.new_full((x.shape[1], 1, height, width), 1 / (height * width))
        return F.conv2d(x, weight, stride=geometry.stride, dilation=geometry.dilation, groups=x.shape[1])

    def equivalent_kernel(self) -> Kernel:
        if (inner := self._inner) is None:
            kernel = identity_kernel(self.geometry.in_channels, self.geometry.groups)
        else:
            kernel = fold_norm(conv_kernel(inner[0]), inner[1])
        return fold_norm(averaged(kernel, self.geometry.kernel_size), self.norm)

    def reset(self, init: str, generator: torch.Generator | None = None) -> None:
        if (inner := self._inner) is not None:
            init_weight(inner[0].weight, init, generator)
            reset_norm(inner[1])
        reset_norm(self.norm)

    def zero_init(self) -> None:
        zero_init_norm(self.norm)

    def match_scale(self, kernel: Tensor, spread: Tensor) -> None:
        self.norm.weight.copy_(spread)
