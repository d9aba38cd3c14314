"""Check a block family's branches over many geometries, for everything that training and merging require."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from repan_cli.blocks.branches import Branch, conv_bn
from repan_cli.blocks.geometry import Geometry, PaddingMode
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.blocks.rep_block import RepBlock
from repan_cli.errors import InputError
from repan_cli.system.text import first_line

USUAL = Geometry(8, 8, (3, 3), padding=(1, 1))
"""A geometry that every family must accept."""

TRIES = 28
TOLERANCE = 1e-10
"""The limit on the relative error of a merged branch in float64: a correct one has 1e-15, a wrong one 1e-2."""

METHODS = ("equivalent_kernel", "reset", "zero_init", "match_scale")
HEIGHT, WIDTH = 11, 12


def check(name: str, build: Callable[..., Any]) -> None:
    """Raise InputError, with the geometry, if branches from `build` break a rule. Draws nothing from the global
    generator.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for geometry in _geometries():
            try:
                problem = _problem(build, geometry)
            except Exception as error:  # a user's code may raise anything
                problem = f"fails: {type(error).__name__}: {first_line(error)}"
            if problem:
                raise InputError(f"the block family {name} {problem}, for {_described(geometry)}")


def _geometries() -> Iterator[Geometry]:
    """Yield the usual geometry, with stride 2, 1x1, depthwise, and random ones, the same each time."""
    yield USUAL
    yield Geometry(8, 16, (3, 3), (2, 2), (1, 1))
    yield Geometry(8, 8, (1, 1))
    yield Geometry(8, 8, (5, 5), padding=(2, 2), groups=8)
    draw = random.Random(0)
    for _ in range(TRIES):
        kernel, stride, padding, dilation = (
            (draw.randint(low, high), draw.randint(low, high)) for low, high in ((1, 5), (1, 3), (0, 3), (1, 2))
        )
        channels, groups = draw.choice((4, 8)), draw.choice((1, 2, 4))
        outputs = channels * draw.choice((1, 2))
        yield Geometry(channels, outputs, kernel, stride, padding, dilation, groups, draw.choice(get_args(PaddingMode)))


def _described(geometry: Geometry) -> str:
    sizes = {name: getattr(geometry, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    pairs = ", ".join(f"{name.removesuffix('_size')} {height}x{width}" for name, (height, width) in sizes.items())
    channels = f"{geometry.in_channels} to {geometry.out_channels} channels in {geometry.groups} groups"
    return f"{pairs}, {channels}, padding mode {geometry.padding_mode}"


def _problem(build: Callable[..., Any], geometry: Geometry) -> str | None:
    """Return the rule that is broken at a geometry; None if all hold, or if the family rejects the geometry."""
    try:
        made, again = build(geometry), build(geometry)
    except ValueError as error:
        return None if geometry != USUAL else f"refuses the usual geometry: {first_line(error)}"
    if problem := _shape_problem(made, again):
        return problem
    block = RepBlock(conv_bn(geometry), made, family="checked").double().eval()
    x = torch.randn(2, geometry.in_channels, HEIGHT, WIDTH, dtype=torch.float64)
    for number, branch in enumerate(block.sides):
        called = f"branch {number} ({type(branch).__name__})"
        for problem in _branch_problems(block, branch, x):
            return f"{problem.format(called)}"
    copy.deepcopy(block)
    return None


def _shape_problem(made: Any, again: Any) -> str | None:
    """Return why the results of two calls are not lists of fresh branches."""
    if not isinstance(made, Sequence):
        return f"returns {type(made).__name__}, not a list of branches"
    for number, branch in enumerate(made):
        if not isinstance(branch, nn.Module):
            return f"returns {type(branch).__name__} as branch {number}, not a torch.nn.Module"
        if lacking := [method for method in METHODS if not callable(getattr(branch, method, None))]:
            return f"returns a branch {number} ({type(branch).__name__}) without {' and '.join(lacking)}"
    first, second = (nn.ModuleList(branches) for branches in (made, again))
    shapes = [{key: value.shape for key, value in some.state_dict().items()} for some in (first, second)]
    if shapes[0] != shapes[1]:
        return "returns different weights in a second call"
    if {id(part) for part in first.modules()} & {id(part) for part in second.modules()}:
        return "returns the same branch in two calls: it must make fresh ones"
    return None


def _branch_problems(block: RepBlock, branch: Branch, x: Tensor) -> Iterator[str]:
    """Yield the faults of a branch of a block in float64, as messages without its name; `x` is (N, C_in, H, W)."""
    expected = block.trunk(x)
    if branch(x).shape != expected.shape:
        yield f"returns {tuple(branch(x).shape)} from {{}}, its trunk {tuple(expected.shape)}"
        return
    yield from _merge_problems(block, branch, x, "")
    kept = []
    for init in ("kaiming", "kaiming", "small"):
        branch.reset(init, torch.Generator().manual_seed(1))
        kept.append([value.clone() for value in _state(branch)])
    if not all(map(torch.equal, kept[0], kept[1])):
        yield "uses random numbers from outside the given generator in the reset of {}"
    yield from _merge_problems(block, branch, x, " after reset")
    branch.match_scale(block.trunk.equivalent_kernel()[0], expected.double().std((0, 2, 3)).cpu())
    yield from _merge_problems(block, branch, x, " after match_scale")
    branch.zero_init()
    for mode in (True, False):
        block.train(mode)
        if branch(x).abs().max() > TOLERANCE:
            yield f"is not zero after zero_init of {{}} in {'train' if mode else 'eval'} mode"


def _state(branch: Branch) -> list[Tensor]:
    assert isinstance(branch, nn.Module), "every branch is one"
    return list(branch.state_dict().values())


def _merge_problems(block: RepBlock, branch: Branch, x: Tensor, when: str) -> Iterator[str]:
    """Yield the faults of a branch's equivalent kernel. Its BN layers get random statistics, so that no fault is
    hidden.
    """
    _disturb(branch)
    weight, bias = branch.equivalent_kernel()
    conv = block.trunk.conv
    outputs = conv.out_channels
    if weight.shape != conv.weight.shape or bias.shape != (outputs,):
        wanted = f"{tuple(conv.weight.shape)} and ({outputs},)"
        yield f"gives a kernel of {tuple(weight.shape)} and {tuple(bias.shape)}, not {wanted}, for {{}}{when}"
        return
    if weight.dtype != torch.float64 or bias.dtype != torch.float64 or weight.device.type != "cpu":
        yield f"gives a kernel in {weight.dtype} on {weight.device}, not in float64 on the CPU, for {{}}{when}"
        return
    found, expected = block.merged((weight, bias))(x), branch(x)
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    if not error <= TOLERANCE and (found - expected).abs().max() > 1e-300:
        yield f"does not merge exactly: equivalent_kernel of {{}} is off by {error:.0e}{when}"


def _disturb(branch: Branch) -> None:
    """Give every BN random statistics and affine parameters, and replace parameters that are all zero."""
    for module in branch.modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2.2)
            for value in (module.weight, module.bias):
                if value is not None:
                    value.normal_()
    for value in (each for module in branch.modules() for each in module.parameters(recurse=False)):
        if not value.any():
            value.normal_(std=0.1)
