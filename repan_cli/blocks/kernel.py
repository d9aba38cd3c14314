"""Define the algebra of merging: pure functions on equivalent kernels, in float64 on the CPU.

A kernel is a pair (K, b) that stands for the convolution `y = conv(x; K) + b`. K has shape (C_out, C_in / groups, kh,
kw), b has shape (C_out,). Stride, padding, dilation and groups are those of the block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Kernel = tuple[Tensor, Tensor]
Size = tuple[int, int]
BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of all of PyTorch's BN layers, SyncBatchNorm included."""


def size_of(numbers: Iterable[int]) -> Size:
    """Return two numbers as (height, width)."""
    height, width = numbers
    return height, width


def exact(tensor: Tensor) -> Tensor:
    """Return a detached float64 copy on the CPU, where merging happens.

    Float64 tells errors from rounding, and MPS does not have it.
    """
    return tensor.detach().cpu().to(torch.float64, copy=True)


def running_stats(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return a BN's running mean and variance, (C,).

    Raises ValueError for a BN that keeps none, because it is not a fixed function in eval mode.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BN without running statistics (track_running_stats=False) cannot be merged")
    return norm.running_mean, norm.running_var


def norm_affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Write a BN in eval mode as `y = scale * x + shift`; both of shape (C,).

    scale = gamma / sigma, shift = beta - mean * gamma / sigma, sigma = sqrt(var + eps). Without affine parameters,
    gamma is 1 and beta is 0. Raises ValueError for a BN that keeps no running statistics.
    """
    mean, var = running_stats(norm)
    scale = 1 / torch.sqrt(exact(var) + norm.eps)
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(mean) * scale
    if norm.bias is not None:
        shift = shift + exact(norm.bias)
    return scale, shift


def fold_norm(kernel: Kernel, norm: BatchNorm) -> Kernel:
    """Return the kernel of a convolution followed by a BN (RepVGG, Ding et al. 2021, equation 3)."""
    weight, bias = kernel
    scale, shift = norm_affine(norm)
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift


def conv_kernel(conv: nn.Conv2d) -> Kernel:
    """Return the kernel of a convolution by itself; without a bias, b is 0."""
    weight = exact(conv.weight)
    bias = exact(conv.bias) if conv.bias is not None else weight.new_zeros(weight.shape[0])
    return weight, bias


def embed(kernel: Kernel, size: Size, offset: Size) -> Kernel:
    """Write a smaller kernel into a kernel of zeros of `size` (kh, kw), with its first tap at `offset` (row,
    column).
    """
    weight, bias = kernel
    if weight.shape[2:] == size:
        return kernel
    canvas = weight.new_zeros(*weight.shape[:2], *size)
    (top, left), (height, width) = offset, weight.shape[2:]
    canvas[:, :, top : top + height, left : left + width] = weight
    return canvas, bias


def compose(first: Kernel, second: Kernel, groups: int) -> Kernel:
    """Return the kernel of a 1x1 convolution `first` followed by a convolution `second`, both with `groups` groups.

    K[o, i] = sum_m K2[o, m] K1[m, i] within a group, b = b2 + sum K2 b1 (DBB, Ding et al. 2021, transform III). It is
    exact if the borders of the map between them hold b1, which is what the first convolution makes of zeros.
    """
    (inner, inner_bias), (outer, outer_bias) = first, second
    inner = inner.flatten(1).unflatten(0, (groups, -1))
    outer = outer.unflatten(0, (groups, -1))
    weight = torch.einsum("gomhw,gmi->goihw", outer, inner).flatten(0, 1)
    bias = torch.einsum("gomhw,gm->go", outer, inner_bias.unflatten(0, (groups, -1))).flatten()
    return weight, outer_bias + bias


def averaged(kernel: Kernel, size: Size) -> Kernel:
    """Return the kernel of a 1x1 convolution followed by an average over windows of `size` (DBB, transform V)."""
    weight, bias = kernel
    return (weight / (size[0] * size[1])).expand(-1, -1, *size), bias


def identity_kernel(channels: int, groups: int) -> Kernel:
    """Return the 1x1 kernel that copies its input: E[i, i mod (C / g)] = 1."""
    index = torch.arange(channels)
    weight = torch.zeros(channels, channels // groups, 1, 1, dtype=torch.float64)
    weight[index, index % (channels // groups)] = 1
    return weight, torch.zeros(channels, dtype=torch.float64)
