"""The re-parameterizable block: a sum of linear branches that merges into one convolution."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from repan_cli.blocks.branches import Branch, ConvBN
from repan_cli.blocks.kernel import BatchNorm, Kernel, fold_norm, size_of
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean


class RepBlock(nn.Module):
    """`post_norm(trunk(x) + attach_rate * sum(branch(x) for branch in branches))`; the non-linearity stays outside.

    `attach_rate` is a 0-d buffer, 1 in a fresh block. It is part of the function: it is saved with the weights and
    folded in by merging. It is set in place, so that compiled and captured graphs see it change.

    `post_norm` is a BN after the sum, in families that have one (QARepVGG, Chu et al. 2022). `fully_attached` is true
    if the rate is known to be 1; `forward` then leaves it out, which saves three operations forward and backward and
    gives the same bits. See `known_attached`.
    """

    attach_rate: Tensor
    fully_attached: bool = False

    def __init__(
        self, trunk: ConvBN, branches: Sequence[Branch], *, family: str, post_norm: BatchNorm | None = None
    ) -> None:
        super().__init__()
        self.family = family
        self.trunk = trunk
        self.branches = nn.ModuleList(cast("Sequence[nn.Module]", branches))  # no type expresses both
        self.post_norm = post_norm or nn.Identity()
        self.register_buffer("attach_rate", torch.ones(()))

    @property
    def sides(self) -> list[Branch]:
        """Return the side branches with their own type; `branches` holds them as modules."""
        return [cast("Branch", branch) for branch in self.branches]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H_out, W_out)."""
        y = self.trunk(x)
        sides = [branch(x) for branch in self.branches]
        if sides:
            side = sum(sides[1:], sides[0])
            # under autocast a float32 rate would promote the sum
            y = y + side if self.fully_attached else torch.addcmul(y, side, self.attach_rate.to(y.dtype))
        return self.post_norm(y)

    def sum_kernel(self) -> Kernel:
        """Return the convolution that equals the sum of the branches in eval mode, before `post_norm`."""
        weight, bias = self.trunk.equivalent_kernel()
        rate = self.attach_rate.item()
        for branch in self.sides:
            side_weight, side_bias = branch.equivalent_kernel()
            if rate != 1:
                side_weight, side_bias = rate * side_weight, rate * side_bias
            weight, bias = weight + side_weight, bias + side_bias
        return weight, bias

    def equivalent_kernel(self) -> Kernel:
        """Return the convolution that equals the block in eval mode: float64, CPU, attach rate folded in."""
        kernel = self.sum_kernel()
        return kernel if isinstance(self.post_norm, nn.Identity) else fold_norm(kernel, self.post_norm)

    def reparameterize(self) -> nn.Conv2d:
        """Return a convolution equal to this block in eval mode, with the trunk's device, dtype and memory format."""
        return self.merged(self.equivalent_kernel())

    def collapse(self) -> None:
        """Replace the trunk by a convolution, with a bias, that equals the sum, and drop the branches."""
        self.trunk = ConvBN(self.merged(self.sum_kernel()), None, canvas=self.trunk.canvas)
        self.branches = nn.ModuleList()

    def without_branches(self, kernel: Kernel) -> Kernel:
        """Return the kernel of the whole sum minus the branches' contribution, which is the trunk's part."""
        weight, bias = kernel
        rate = self.attach_rate.item()
        for side_weight, side_bias in (branch.equivalent_kernel() for branch in self.sides):
            weight, bias = weight - rate * side_weight, bias - rate * side_bias
        return weight, bias

    def merged(self, kernel: Kernel) -> nn.Conv2d:
        """Return a convolution with this kernel and the trunk's type, geometry, device, dtype and memory format."""
        conv, (weight, bias) = self.trunk.conv, kernel
        merged = _fresh(conv) if type(conv) is nn.Conv2d else copy.deepcopy(conv)
        if merged.bias is None:
            merged.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        if conv.weight.is_contiguous(memory_format=torch.channels_last):
            merged = merged.to(memory_format=torch.channels_last)
        with torch.no_grad():
            merged.weight.copy_(weight)
            assert merged.bias is not None, "it has got one"
            merged.bias.copy_(bias)
        merged.requires_grad_(conv.weight.requires_grad)
        return merged.train(self.training)

    def extra_repr(self) -> str:
        return f"family={self.family}"


def _fresh(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a new convolution with a bias and the geometry, device and dtype of another."""
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        size_of(conv.kernel_size),
        stride=size_of(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else size_of(conv.padding),
        dilation=size_of(conv.dilation),
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def rep_blocks(model: nn.Module) -> Iterator[tuple[str, RepBlock]]:
    """Return the blocks of a network with their names, in the order of its modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RepBlock))


def chosen_blocks(model: nn.Module, only: Collection[str] | None = None) -> dict[str, RepBlock]:
    """Return the blocks of a network by name, or those named in `only`. Raises InputError for a name that none has."""
    found = dict(rep_blocks(model))
    if unknown := sorted(set(only or ()) - found.keys()):
        hint = did_you_mean(unknown[0], found) or ": blocks.rep_blocks(model) lists the names"
        raise InputError(f"only: the network has no block '{unknown[0]}'{hint}")
    return {name: block for name, block in found.items() if only is None or name in only}


def attach_rates(model: nn.Module, *, only: Collection[str] | None = None) -> list[Tensor]:
    """Return the attach rates of every block, or of the blocks named in `only`."""
    return [block.attach_rate for block in chosen_blocks(model, only).values()]


def set_attach_rate(model: nn.Module, rate: float, *, only: Collection[str] | None = None) -> None:
    """Set the attach rate of every block, or of the blocks named in `only`, in place."""
    fill_all(attach_rates(model, only=only), rate)


@contextlib.contextmanager
def known_attached(blocks: Sequence[RepBlock], known: bool = True) -> Iterator[None]:
    """Let blocks skip their attach rates within the context, if `known` says that all of them are 1."""
    for block in (told := blocks if known else ()):
        block.fully_attached = True
    try:
        yield
    finally:
        for block in told:
            block.fully_attached = False


def fill_all(tensors: list[Tensor], value: float) -> None:
    """Set many tensors to one number in place, in two launches."""
    if tensors:
        torch._foreach_zero_(tensors)
        torch._foreach_add_(tensors, value)


def reinit_branches(
    block: RepBlock, attach: str, *, branch_init: str = "kaiming", generator: torch.Generator | None = None
) -> None:
    """Reset the side branches in place.

    They start at attach rate 0 (`attach="ramp"`), at rate 1 with a zero last gamma (`zero-gamma`), or at rate 1
    (`one`).
    """
    for branch in block.sides:
        branch.reset(branch_init, generator)
        if attach == "zero-gamma":
            branch.zero_init()
    block.attach_rate.fill_(0.0 if attach == "ramp" else 1.0)


def reparameterize(model: nn.Module) -> nn.Module:
    """Merge every block of a network into its convolution, in place, and return the plain network.

    Nothing else changes: device, dtype, memory format, training mode and `requires_grad` of all other modules stay. A
    model that is itself a block is returned as its convolution.
    """
    if isinstance(model, RepBlock):
        return model.reparameterize()
    merged: dict[RepBlock, nn.Conv2d] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a second name
            if isinstance(child, RepBlock):
                if child not in merged:
                    merged[child] = child.reparameterize()
                setattr(parent, name, merged[child])
    return model
