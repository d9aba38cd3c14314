"""Measure what each block of a merged network computes: the statistics that restoration needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli.anneal.restoration import Moments
from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.blocks.kernel import conv_kernel, exact, running_stats
from repan_cli.errors import InputError
from repan_cli.system.copies import deep_copy, unwrapped
from repan_cli.system.images import ImagesLike, image_batches
from repan_cli.system.ranks import summed


class ChannelSums:
    """Sums of each channel's values and squares, in float64."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def __call__(self, values: Tensor) -> None:
        """Add an output (N, C, H, W)."""
        values = values.detach()
        values = (values.cpu() if values.device.type == "mps" else values).double()  # MPS has no float64
        self.total = self.total + values.sum((0, 2, 3))
        self.squares = self.squares + values.square().sum((0, 2, 3))
        self.count += values.numel() // values.shape[1]

    def moments(self, bias: Tensor) -> Moments:
        """Return the moments of the convolution's output without its bias, over the images of all ranks."""
        count = torch.full_like(self.total, self.count)
        total, squares, count = (exact(part) for part in summed(torch.stack([self.total, self.squares, count])))
        mean, squares = total / count, squares / count
        return Moments(mean - bias, (squares - mean**2).clamp_min(0))


Seen = Callable[[Tensor, Tensor], None]
"""A function of a block's input (N, C_in, H, W) and output (N, C_out, H', W')."""


class MergedProbe:
    """A merged copy of a network in eval mode, in which every block can be observed.

    Every block keeps its function, so one pass measures all of them. The copy keeps hooks away from compiled and
    wrapped modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.network = deep_copy(unwrapped(model)).eval()
        blocks = dict(rep_blocks(self.network))
        self.with_norm = [name for name, block in blocks.items() if block.trunk.has_norm]
        for block in blocks.values():
            block.collapse()
        self.convs = {name: block.trunk.conv for name, block in blocks.items()}

    def bias(self, name: str) -> Tensor:
        """Return the merged bias (C_out,) of a block, in float64 on the CPU."""
        return conv_kernel(self.convs[name])[1]

    @torch.no_grad()
    def run(self, images: Iterable[Tensor], seen: Mapping[str, Seen]) -> None:
        """Run batches (N, C, H, W) through the network, and pass each block's input and output to its function in
        `seen`.

        Raises InputError if a block is never called.
        """
        missing = set(seen)

        def watch(name: str) -> Callable[..., None]:
            def hook(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                missing.discard(name)
                seen[name](inputs[0], output)

            return hook

        handles = [self.convs[name].register_forward_hook(watch(name)) for name in seen]
        device = next(self.network.parameters()).device
        for batch in images if seen else ():
            self.network(batch.to(device))
        for handle in handles:
            handle.remove()
        if missing:
            needed = "rule=calibrate and attach=compensated need images that reach every block"
            raise InputError(f"{needed}: none did; give images=...")


def calibrate(model: nn.Module, images: ImagesLike) -> dict[str, Moments]:
    """Measure the moments of `conv(x; K)` at every block whose trunk has a BN; return them by block name."""
    probe = MergedProbe(model)
    sums = {name: ChannelSums() for name in probe.with_norm}
    probe.run(image_batches(images), {name: _output_to(collect) for name, collect in sums.items()})
    return {name: collect.moments(probe.bias(name)) for name, collect in sums.items()}


def _output_to(collect: ChannelSums) -> Seen:
    return lambda x, y: collect(y)


def calibrate_branch_norms(
    probe: MergedProbe, blocks: Mapping[str, RepBlock], images: list[Tensor]
) -> dict[str, Tensor]:
    """Set the statistics of the BN layers in all side branches to those of their inputs, layer by layer.

    Returns the standard deviation of each block's output, (C_out,).
    """
    branches = [branch for block in blocks.values() for branch in block.sides]
    norms = [[module for module in branch.modules() if isinstance(module, _BatchNorm)] for branch in branches]
    training = {norm: norm.training for own in norms for norm in own}
    for norm in training:
        norm.eval()
    for level in range(max([1, *map(len, norms)])):
        outputs = {name: ChannelSums() for name in blocks}
        inputs = {own[level]: ChannelSums() for own in norms if level < len(own)}
        handles = [norm.register_forward_pre_hook(_input_to(collect)) for norm, collect in inputs.items()]
        probe.run(images, {name: _both(block, outputs[name]) for name, block in blocks.items()})
        for norm, handle in zip(inputs, handles, strict=True):
            handle.remove()
            for buffer, moment in zip(running_stats(norm), inputs[norm].moments(torch.zeros(())), strict=True):
                buffer.copy_(moment)
    for norm, was in training.items():
        norm.train(was)
    return {name: collect.moments(torch.zeros(())).var.sqrt() for name, collect in outputs.items()}


def _both(block: RepBlock, collect: ChannelSums) -> Seen:
    """Collect the block's output, and pass its input to its branches."""

    def seen(x: Tensor, y: Tensor) -> None:
        collect(y)
        for branch in block.branches:
            branch(x)

    return seen


def _input_to(collect: ChannelSums) -> Callable[..., None]:
    return lambda norm, inputs: collect(inputs[0])


def through(conv: nn.Conv2d, collect: ChannelSums) -> Seen:
    return lambda x, y: collect(conv(x))
