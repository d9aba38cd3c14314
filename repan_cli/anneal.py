"""The method: the restart between two annealing cycles, and the plan of a run as pure functions of position.

RepAn, "Enhanced Annealing through Re-parameterization" (CVPR 2024): merge every block (Rep), re-initialise its side
branches (expansion), write the merged kernel back into the trunk so that the function is kept (restoration), train
on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli.blocks import FAMILIES, OWN, RepBlock, refresh, rep_blocks
from repan_cli.blocks.kernel import Kernel, exact
from repan_cli.config import SCHEMA, Config, Cycle, Optim, Teacher, baseline_phase
from repan_cli.errors import InputError
from repan_cli.optim import learning_rate
from repan_cli.registry import did_you_mean
from repan_cli.runtime import summed

TINY_GAMMA = 1e-6
"""Below this |gamma| the rule `running` cannot divide by it."""


# ---------------------------------------------------------------------------------------------- restoration


class Moments(NamedTuple):
    """Mean and biased variance (C_out,) of `conv(x; K)` over images and positions, in float64."""

    mean: Tensor
    var: Tensor


class Trunk(NamedTuple):
    """What restoration writes into a trunk, in float64 on the CPU.

    The weight is (C_out, C_in / groups, kh, kw), the rest (C_out,).
    """

    weight: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor


def restore_calibrate(kernel: Kernel, moments: Moments, eps: float, scale: Tensor) -> Trunk:
    """Measured statistics and the affine parameters that undo them: exact in eval mode, kept in train mode.

    With W = s K: mean = s m, var = s^2 v, gamma = sqrt(s^2 v + eps) / s, beta = b + m. `scale` is s, (C_out,),
    positive.
    """
    weight, bias = kernel
    mean, var = moments
    gamma = torch.sqrt(scale**2 * var + eps) / scale
    return Trunk(weight * scale.view(-1, 1, 1, 1), scale * mean, scale**2 * var, gamma, bias + mean)


def restore_reset(kernel: Kernel, eps: float) -> Trunk:
    """A fresh BN made an identity in eval mode: mean 0, var 1, gamma sqrt(1 + eps), W = K, beta = b."""
    weight, bias = kernel
    ones = torch.ones_like(bias)
    return Trunk(weight, torch.zeros_like(bias), ones, (1 + eps) ** 0.5 * ones, bias)


def restore_running(kernel: Kernel, norm: nn.BatchNorm2d, *, unit_gamma: bool) -> Trunk:
    """As the method was released: the trunk's BN statistics and gamma stay, W = K sigma / gamma, beta = b + mean
    gamma / sigma.

    With `unit_gamma` gamma becomes 1; so it does for channels whose gamma is too small to divide by.
    """
    weight, bias = kernel
    mean, var, gamma = exact(norm.running_mean), exact(norm.running_var), exact(norm.weight)
    sigma = torch.sqrt(var + norm.eps)
    gamma = torch.ones_like(gamma) if unit_gamma else torch.where(gamma.abs() < TINY_GAMMA, 1.0, gamma)
    return Trunk(weight * (sigma / gamma).view(-1, 1, 1, 1), mean, var, gamma, bias + mean * gamma / sigma)


@torch.no_grad()
def _write(block: RepBlock, kernel: Kernel, trunk: Trunk | None) -> None:
    """Copy into the storage that is there: optimizers, DDP and captured graphs hold on to it.

    A trunk without BN (`trunk` None) takes the kernel as it is.
    """
    conv, norm = block.trunk.conv, block.trunk.norm
    weight, bias = kernel
    if trunk is not None:
        weight, bias = trunk.weight, torch.zeros_like(bias)
        norm.running_mean.copy_(trunk.mean)
        norm.running_var.copy_(trunk.var)
        norm.weight.copy_(trunk.gamma)
        norm.bias.copy_(trunk.beta)
    conv.weight.copy_(weight)
    if conv.bias is not None:
        conv.bias.copy_(bias)
    else:
        assert not bias.any(), "a trunk with neither BN nor bias cannot take a bias"


# ---------------------------------------------------------------------------------------------- calibration


class _Sums:
    """Sums of a channel's values and squares, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.count = 0

    def __call__(self, values: Tensor) -> None:
        values = values.detach()
        values = (values.cpu() if values.device.type == "mps" else values).double()  # which has no float64
        self.total = self.total + values.sum((0, 2, 3))
        self.squares = self.squares + values.square().sum((0, 2, 3))
        self.count += values.numel() // values.shape[1]

    def moments(self, bias: Tensor) -> Moments:
        """Of the convolution's output without its bias, over the images of all ranks."""
        count = torch.full_like(self.total, self.count)
        total, squares, count = (exact(part) for part in summed(torch.stack([self.total, self.squares, count])))
        mean, squares = total / count, squares / count
        return Moments(mean - bias, (squares - mean**2).clamp_min(0))


Seen = Callable[[Tensor, Tensor], None]
"""Takes a block's input (N, C_in, H, W) and output (N, C_out, H', W')."""


class Merged:
    """A merged copy of a network in eval mode, in which every block can be looked at: since every block keeps its
    function, one pass tells of all of them. Being a copy, it leaves hooks away from compiled and wrapped modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.network = copy.deepcopy(unwrapped(model)).eval()
        blocks = dict(rep_blocks(self.network))
        self.with_norm = [name for name, block in blocks.items() if block.trunk.has_norm]
        for block in blocks.values():
            block.collapse()
        self.convs = {name: block.trunk.conv for name, block in blocks.items()}

    @torch.no_grad()
    def look(self, images: Iterable[Tensor | Sequence[Tensor]], seen: Mapping[str, Seen]) -> None:
        """Send batches (N, C, H, W) through, and give what each block reads and writes to what `seen` has for its name.

        Raises InputError when a block is not reached.
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
            self.network((batch if isinstance(batch, Tensor) else batch[0]).to(device))
        for handle in handles:
            handle.remove()
        if missing:
            raise InputError(
                "cycle.rule=calibrate and cycle.attach=compensated need images that reach every block, and got none"
            )


def calibrate(model: nn.Module, images: Iterable[Tensor | Sequence[Tensor]]) -> dict[str, Moments]:
    """The moments of `conv(x; K)` at every block whose trunk has a BN, by the block's name."""
    merged = Merged(model)
    sums = {name: _Sums() for name in merged.with_norm}
    merged.look(images, {name: _output_to(collect) for name, collect in sums.items()})
    return {name: collect.moments(exact(merged.convs[name].bias)) for name, collect in sums.items()}


def _output_to(collect: _Sums) -> Seen:
    return lambda x, y: collect(y)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile and data-parallel wrappers, whose parameters it shares."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


# ---------------------------------------------------------------------------------------------- restart


@dataclass(frozen=True)
class RestartReport:
    """What a restart did: how many blocks, and in how many channels `running` had to replace a zero gamma by 1."""

    blocks: int
    zero_gammas: int = 0


def restart(
    model: nn.Module,
    *,
    rule: str = "calibrate",
    images: Iterable[Tensor | Sequence[Tensor]] = (),
    attach: str = "ramp",
    branch_init: str = "kaiming",
    trunk_scale: str = "merged",
    only: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> RestartReport:
    """Rep, expansion and restoration of every block, in place on the same parameters.

    The function in eval mode is kept (except with `attach="one"`, which lets the fresh branches in at once); with the
    rule `calibrate` the one in train mode is too, up to the difference between `images` and the training batches.
    A block without a BN in its trunk takes the merged kernel as it is, under every rule. Zero the optimizer's momentum
    afterwards.

    Args:
        rule: restoration rule: `calibrate`, `running` (as released) or `reset`.
        images: batches (N, C, H, W) that `calibrate` measures on, 1,000 images or more, as train mode will see them;
            of a loader's (images, labels) the images are taken.
        attach: `ramp` sets the attach rate to 0, `zero-gamma` to 1 with the branches silenced, `compensated` to 1 with
            branches as strong as the block, which the trunk makes up for, `one` to 1.
        branch_init: weights of the fresh branches, `kaiming` or `small`.
        trunk_scale: under `calibrate`, `merged` writes K, `keep` scales every channel to the trunk's old norm.
        only: names of the blocks to restart, as `blocks.rep_blocks` gives them; None is all.
        generator: draws the fresh weights.

    Raises InputError for a choice that does not exist, when the model has no such block, or `calibrate` got no images.
    """
    for key, value in (("rule", rule), ("attach", attach), ("branch_init", branch_init), ("trunk_scale", trunk_scale)):
        choices = SCHEMA[f"cycle.{key}"].choices
        if value not in choices:
            raise InputError(
                f"{key}='{value}' is not a choice{did_you_mean(str(value), choices)}: {', '.join(choices)}"
            )
    model = unwrapped(model)
    blocks = {name: block for name, block in rep_blocks(model) if only is None or name in only}
    if not blocks:
        raise InputError("the network has no re-parameterizable block, so there is nothing to restart")
    if attach == "compensated":
        kernels, moments = _compensated(model, blocks, list(images), branch_init, generator)
    else:
        kernels = {name: block.sum_kernel() for name, block in blocks.items()}
        moments = calibrate(model, images) if rule == "calibrate" else {}
    zero_gammas = 0
    for name, block in blocks.items():
        trunk = None
        if block.trunk.has_norm:
            trunk = _restored(block, kernels[name], rule, moments.get(name), trunk_scale)
            if rule == "running" and not _unit_gamma(block):
                zero_gammas += int((block.trunk.norm.weight.abs() < TINY_GAMMA).sum())
        _write(block, kernels[name], trunk)
        if attach != "compensated":
            refresh(block, attach, branch_init=branch_init, generator=generator)
    return RestartReport(len(blocks), zero_gammas)


@torch.no_grad()
def _compensated(
    model: nn.Module,
    blocks: Mapping[str, RepBlock],
    images: list[Tensor | Sequence[Tensor]],
    branch_init: str,
    generator: torch.Generator | None,
) -> tuple[dict[str, Kernel], dict[str, Moments]]:
    """Fresh side branches that are active from the first step, and the kernels and moments of trunks without them.

    Every BN in a branch has the statistics of its input then, and the branch's output the standard deviation of the
    block's; a last pass over the images measures `conv(x; K - sum K_i)`, what is left to the trunk.
    """
    merged = Merged(model)
    left = {name: block.sum_kernel() for name, block in blocks.items()}
    for block in blocks.values():
        refresh(block, "one", branch_init=branch_init, generator=generator)
    spreads = _settle(merged, blocks, images)
    for name, block in blocks.items():
        for branch in block.branches:
            branch.admit(left[name][0], spreads[name])
        left[name] = block.without_branches(left[name])
    sums = {name: _Sums() for name, block in blocks.items() if block.trunk.has_norm}
    trunks = {name: blocks[name].merged((left[name][0], torch.zeros_like(left[name][1]))) for name in sums}
    merged.look(images, {name: _through(trunks[name], collect) for name, collect in sums.items()})
    return left, {name: collect.moments(torch.zeros(())) for name, collect in sums.items()}


def _settle(
    merged: Merged, blocks: Mapping[str, RepBlock], images: list[Tensor | Sequence[Tensor]]
) -> dict[str, Tensor]:
    """Give the BN layers of all side branches the statistics of their inputs, those that come first in a branch before
    those behind them; gives the standard deviation of each block's output, (C_out,).
    """
    branches = [branch for block in blocks.values() for branch in block.branches]
    norms = [[module for module in branch.modules() if isinstance(module, _BatchNorm)] for branch in branches]
    training = {norm: norm.training for own in norms for norm in own}
    for norm in training:
        norm.eval()
    for level in range(max([1, *map(len, norms)])):
        outputs = {name: _Sums() for name in blocks}
        inputs = {own[level]: _Sums() for own in norms if level < len(own)}
        handles = [norm.register_forward_pre_hook(_input_to(collect)) for norm, collect in inputs.items()]
        merged.look(images, {name: _both(block, outputs[name]) for name, block in blocks.items()})
        for norm, handle in zip(inputs, handles, strict=True):
            handle.remove()
            mean, var = inputs[norm].moments(torch.zeros(()))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    for norm, was in training.items():
        norm.train(was)
    return {name: collect.moments(torch.zeros(())).var.sqrt() for name, collect in outputs.items()}


def _both(block: RepBlock, collect: _Sums) -> Seen:
    """Collects the block's output, and shows its input to its branches."""

    def seen(x: Tensor, y: Tensor) -> None:
        collect(y)
        for branch in block.branches:
            branch(x)

    return seen


def _input_to(collect: _Sums) -> Callable[..., None]:
    return lambda norm, inputs: collect(inputs[0])


def _through(conv: nn.Conv2d, collect: _Sums) -> Seen:
    return lambda x, y: collect(conv(x))


def _restored(block: RepBlock, kernel: Kernel, rule: str, moments: Moments | None, trunk_scale: str) -> Trunk:
    norm = block.trunk.norm
    if rule == "calibrate":
        return restore_calibrate(kernel, moments, norm.eps, _scale(block, kernel, trunk_scale))
    if rule == "reset":
        return restore_reset(kernel, norm.eps)
    return restore_running(kernel, norm, unit_gamma=_unit_gamma(block))


def _unit_gamma(block: RepBlock) -> bool:
    return block.family != OWN and FAMILIES[block.family].unit_gamma


def _scale(block: RepBlock, kernel: Kernel, trunk_scale: str) -> Tensor:
    """The factor on each channel of the merged kernel, (C_out,): 1, or |W_old| / |K| (1 where either is 0)."""
    merged = kernel[0].flatten(1).norm(dim=1)
    if trunk_scale == "merged":
        return torch.ones_like(merged)
    old = exact(block.trunk.conv.weight).flatten(1).norm(dim=1)
    return torch.where((merged > 0) & (old > 0), old / merged, 1.0)


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Phase:
    """A stretch of a run: the baseline (cycle 0, no restart) or one annealing cycle.

    `course_start` and `course_length` place the phase, in epochs, within its course of the learning rate. `start_from`:
    which of its weights it leaves to the next one, see `cycle.start_from`.
    """

    cycle: int
    epochs: int
    optim: Optim
    settings: Cycle | None
    course_start: float
    course_length: float
    teacher: Teacher = field(default_factory=Teacher)
    start_from: str = "last"

    def learning_rate(self, elapsed: float) -> float:
        """The rate `elapsed` epochs into this phase."""
        return learning_rate(self.optim, self.course_start + elapsed, self.course_length)

    @property
    def restarts(self) -> bool:
        """Whether blocks are merged and regrown before this phase; the baseline and the control go without."""
        return self.settings is not None and self.settings.restart == "repan"

    def attach_rate(self, elapsed: float) -> float | None:
        """The attach rate `elapsed` epochs into this phase; None where it stays as it is."""
        if not self.restarts or self.settings.attach != "ramp":
            return None
        return min(1.0, elapsed / self.settings.attach_epochs) if self.settings.attach_epochs else 1.0

    def trunk_is_frozen(self, elapsed: float) -> bool:
        """Whether the trunk stays fixed `elapsed` epochs into this phase."""
        return self.restarts and self.settings.freeze_trunk and elapsed < self.settings.attach_epochs

    def data_cycle(self) -> int:
        """The cycle whose data order this phase uses."""
        return min(self.cycle, 1) if self.settings and self.settings.reseed == "same" else self.cycle


def training_plan(config: Config) -> tuple[Phase, ...]:
    """The one phase of `train` and `distill`."""
    return (Phase(0, config.epochs, config.optim, None, 0, config.epochs, config.teacher),)


def cycle_plan(config: Config, *, baseline: bool) -> tuple[Phase, ...]:
    """The phases of `cycle`: the baseline, unless the run starts from a trained network, and the annealing cycles."""
    start = baseline_phase(config)
    lengths = ([start.epochs] if baseline else []) + [config.epochs] * config.cycle.count
    return tuple(_phases(config, start, lengths, first=0 if baseline else 1))


def _phases(config: Config, baseline: Config, lengths: list[int], *, first: int) -> Iterator[Phase]:
    done = 0
    for cycle, epochs in enumerate(lengths, start=first):
        optim = _decayed(config.optim, config.cycle.lr_decay ** (cycle - 1)) if cycle else baseline.optim
        course = (0, epochs)
        if config.cycle.lr == "continuous":
            course = (done, sum(lengths))
            optim = _with_course_of(optim, baseline.optim if first == 0 else config.optim)
        teacher = config.teacher if cycle else baseline.teacher
        settings = config.cycle if cycle else None
        yield Phase(cycle, epochs, optim, settings, *course, teacher, config.cycle.start_from)
        done += epochs


def _decayed(optim: Optim, factor: float) -> Optim:
    return dataclasses.replace(optim, lr=max(optim.lr * factor, optim.min_lr))


def _with_course_of(optim: Optim, course: Optim) -> Optim:
    """`optim` with the learning-rate settings of `course`."""
    same = {name: getattr(course, name) for name in ("lr", "min_lr", "schedule", "warmup_epochs")}
    return dataclasses.replace(optim, **same)
