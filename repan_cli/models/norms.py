"""Recognize the norms that fold into a convolution: BN, and the norms with fixed statistics that detectors use."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import nn

from repan_cli.blocks.kernel import BatchNorm, running_stats

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
"""The BN types that are understood. A subclass may compute something else."""

OF_FROZEN = {"weight", "bias", "running_mean", "running_var"}
"""The buffers of a frozen BN, whoever wrote it: torchvision, timm, detectron2, DETR."""

EPS = 1e-5
"""The epsilon of a frozen BN that does not store one."""


def is_fixed(module: nn.Module) -> bool:
    """Return whether a module is not a BN but equals one in eval mode.

    These are a frozen BN, and an instance norm that keeps running statistics.
    """
    if type(module) is nn.InstanceNorm2d:
        return module.running_mean is not None
    buffers = {name for name, value in module._buffers.items() if value is not None and value.ndim == 1}
    own = any(parameter is not None for parameter in module._parameters.values())
    return buffers == OF_FROZEN and not own and not module._modules.keys() - {"drop", "act"}


def is_norm(module: nn.Module) -> bool:
    """Return whether a module may be a norm that folds into a convolution."""
    return isinstance(module, BatchNorm) or is_fixed(module)


def check_norm(norm: nn.Module) -> BatchNorm:
    """Return the BN that a module is, or equals in eval mode. Raises ValueError if it cannot be folded."""
    if is_fixed(norm) and "forward" not in vars(norm):
        return _thawed(norm)
    if not isinstance(norm, BatchNorm) or type(norm) not in NORMS or "forward" in vars(norm):
        raise ValueError(f"its norm is a {type(norm).__name__}, whose forward is its own")
    if norm.running_mean is None:
        raise ValueError("its BN keeps no running statistics (track_running_stats=False)")
    return norm


def _thawed(module: nn.Module) -> BatchNorm:
    """Return a BN in eval mode on the tensors of a module for which `is_fixed` is true."""
    mean = module.get_buffer("running_mean")
    norm = nn.BatchNorm2d(len(mean), getattr(module, "eps", EPS), affine=False).eval()
    norm.running_mean, norm.running_var = mean, module.get_buffer("running_var")
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if weight is not None and bias is not None:
        norm.affine = True
        norm.weight, norm.bias = (nn.Parameter(each.detach(), requires_grad=False) for each in (weight, bias))
    return norm


def activation_of(module: nn.Module) -> list[nn.Module]:
    """Return what timm's norm layer applies to its result: drop, activation."""
    if not isinstance(module, BatchNormAct2d) and not is_fixed(module):
        return []
    parts = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
    return [part for part in parts if not isinstance(part, nn.Identity)]


def split_norm(module: nn.Module) -> tuple[BatchNorm, nn.Module]:
    """Return a BN alone, on the same parameters and statistics, always affine, and the activation that was combined
    with it.

    Raises ValueError for a norm that cannot be folded.
    """
    norm = check_norm(module)
    _, var = running_stats(norm)
    if norm.weight is None:
        norm.weight = nn.Parameter(var.new_ones(norm.num_features))
        norm.affine = True
    if norm.bias is None:
        norm.bias = nn.Parameter(var.new_zeros(norm.num_features), norm.weight.requires_grad)
    rest = activation_of(module)
    if isinstance(norm, BatchNormAct2d):
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        plain.weight, plain.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(plain, name, buffer)
        norm = plain.train(norm.training)
    return norm, rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()
