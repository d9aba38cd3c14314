"""Observe a forward pass of a network, and try changes on a float64 copy of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from repan_cli.blocks import rep_blocks
from repan_cli.blocks.kernel import BatchNorm, running_stats
from repan_cli.checkpoint.card import Change
from repan_cli.errors import InputError
from repan_cli.models.changes import apply
from repan_cli.models.outputs import Leaves, difference, differences, inner_modules, inner_outputs, leaves
from repan_cli.models.twins import cut
from repan_cli.system.copies import deep_copy
from repan_cli.system.text import first_line

TOLERANCE = 1e-10
"""The limit on the relative change of the network's output in float64."""

NUDGE, CEILING = 1e-13, 1e-4
"""A network that amplifies rounding may differ as much as this relative change of its images makes it, up to the
ceiling.
"""

PROBE_IMAGES = 2

SOURCE = "_repan_source"
"""The name under which a tensor carries the convolution that returned it, and the tensor's version at that time."""


def noise(*shape: int) -> Tensor:
    """Return random images (N, C, H, W), the same ones every time, to observe a network with."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------- watching


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a BN whose statistics are trained."""
    return isinstance(module, BatchNorm)


class Sightings(NamedTuple):
    """The findings of one forward pass.

    Attributes:
        calls: the number of calls of each module.
        norms: the BN that read exactly the output of a convolution.
        owners: the number of layers that own a parameter, by its id.
    """

    calls: Counter[nn.Module]
    norms: Mapping[nn.Module, list[nn.Module]]
    owners: Counter[int]


class _Dropouts(TorchFunctionMode):
    """Remove the mark of a convolution from outputs that pass a dropout, which returns its input in eval mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "dropout" in getattr(function, "__name__", "") and isinstance(result, Tensor):
            vars(result).pop(SOURCE, None)
        return result


def _unmark(module: nn.Module, inputs: Any, output: Any) -> None:
    """Remove the mark from an output that a module passed through, as stochastic depth does in eval mode."""
    if inputs and output is inputs[0] and isinstance(output, Tensor):
        vars(output).pop(SOURCE, None)


@torch.no_grad()
def watch(
    model: nn.Module,
    images: Tensor,
    *,
    is_norm: Callable[[nn.Module], bool] = is_batch_norm,
    trains: bool = True,
) -> Sightings:
    """Observe one forward pass of a network; on the meta device it costs no arithmetic.

    `is_norm` decides which modules are sought behind convolutions. A frozen BN cannot be part of a block that is
    trained. For a network that `trains`, a dropout or a similar layer parts a convolution from the BN after it.
    """
    calls: Counter[nn.Module] = Counter()
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]
    norms: dict[nn.Module, list[nn.Module]] = {conv: [] for conv in convs}

    def after_conv(conv: nn.Module, inputs: Any, output: Tensor) -> None:
        calls[conv] += 1
        if isinstance(output, Tensor):
            setattr(output, SOURCE, (conv, output._version))  # an in-place change raises the version

    def before_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[norm] += 1
        conv, version = getattr(inputs[0], SOURCE, (None, None)) if inputs else (None, None)
        if conv is not None and inputs[0]._version == version and norm not in norms[conv]:
            norms[conv].append(norm)

    inside = {id(part) for _, block in rep_blocks(model) for part in block.modules()}
    free_norms = [m for m in model.modules() if is_norm(m) and id(m) not in inside]
    hooks = [conv.register_forward_hook(after_conv) for conv in convs]
    hooks += [norm.register_forward_pre_hook(before_norm) for norm in free_norms]
    if trains:
        leaves_of = [module for module in model.modules() if not module._modules and type(module) is not nn.Identity]
        hooks += [module.register_forward_hook(_unmark) for module in leaves_of]
    try:
        with _Dropouts() if trains else contextlib.nullcontext():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return Sightings(calls, norms, owners)


# ---------------------------------------------------------------------------------------------- trying


class Probe:
    """A float64 copy of a network on the CPU in eval mode, and its outputs, to try changes on."""

    bound: float | None
    expected: Leaves

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model = copied(model).cpu().double().eval()
        self.images = cut(self.model, images[:PROBE_IMAGES].detach().cpu().double())
        self.parts: set[str] = set()
        try:
            _disturb(self.model, self.images)
            self._look()
            if self.bound is None and inner_modules(self.model):
                self.parts = inner_modules(self.model)
                self._look()
        except InputError:
            raise
        except Exception as error:
            shape = "x".join(map(str, self.images.shape))
            raise InputError(
                f"the network does not run on images of shape {shape} in float64: {first_line(error)}"
            ) from error
        if self.bound is None:
            raise InputError("the network's output does not depend on its images, so nothing can be compared")

    def _look(self) -> None:
        """Observe the network's outputs, and how far they may differ; `bound` is None if they say nothing.

        A detector may find nothing in the images. Then the larger parts of the network are compared, without those that
        make choices, whose outputs jump.
        """
        expected = self._seen(self.model, self.images)
        if not all(tensor.isfinite().all() for tensor in expected.values()):
            raise InputError("the network's output is not finite, so nothing can be compared")
        if difference(self._seen(self.model, self.images), expected) > TOLERANCE:
            raise InputError(
                "the network gives two outputs for the same images in eval mode, so nothing can be compared"
            )
        nudged = dict(differences(self._seen(self.model, self.images * (1 + NUDGE)), expected))
        if self.parts:
            expected = {name: value for name, value in expected.items() if nudged[name] <= CEILING}
        elsewhere = self._seen(self.model, torch.zeros_like(self.images))
        self.expected = expected
        depends = any(error > TOLERANCE for name, error in differences(elsewhere, expected) if name in expected)
        self.bound = min(max([TOLERANCE, *(nudged[name] for name in expected)]), CEILING) if depends else None

    def _seen(self, model: nn.Module, images: Tensor) -> Leaves:
        return inner_outputs(model, images, self.parts) if self.parts else leaves(model(images))

    def changed(self, changes: Iterable[Change]) -> nn.Module:
        """Return a copy with the changes made, without affecting the global generator."""
        model = deep_copy(self.model)
        with torch.random.fork_rng(devices=[]):
            return apply(model, changes)

    def keep(self, changes: list[Change], *, after: list[Change], left: dict[str, str]) -> list[Change]:
        """Return those of `changes`, made after others, that keep the function; the reasons for the others go into
        `left`.
        """
        kept = list(after)
        self._halve(changes, kept, left)
        return kept[len(after) :]

    def _halve(self, changes: list[Change], kept: list[Change], left: dict[str, str]) -> None:
        """Add all of `changes` to `kept` if they agree together, else try each half."""
        if not changes:
            return
        problem = self._problem([*kept, *changes])
        if problem is None:
            kept += changes
        elif len(changes) == 1:
            left[changes[0].name] = problem
        else:
            middle = len(changes) // 2
            self._halve(changes[:middle], kept, left)
            self._halve(changes[middle:], kept, left)

    def _problem(self, changes: list[Change]) -> str | None:
        try:
            model = self.changed(changes).eval()
        except ValueError as error:
            return str(error)
        try:
            found = self._seen(model, self.images)
        except Exception as error:  # anything may be raised after a convolution was replaced
            return f"as a block it fails: {first_line(error)}"
        compared = {name: value for name, value in found.items() if not self.parts or name in self.expected}
        if self.bound is None or not difference(compared, self.expected) <= self.bound:
            return "as a block it changes the network's function"
        return None


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network. Raises InputError for TorchScript, and for weights that are computed by hooks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the network'} is TorchScript, which cannot be changed: give what it was made of"
            )
    try:
        return deep_copy(model)
    except RuntimeError as error:
        computed = [name for name, module in model.named_modules() if isinstance(vars(module).get("weight"), Tensor)]
        where = computed[0] if computed else "the network"
        raise InputError(
            f"{where} cannot be copied: its weight is computed, as by the older weight_norm; remove that "
            "(remove_weight_norm), or use torch.nn.utils.parametrizations"
        ) from error


@torch.no_grad()
def _disturb(model: nn.Module, images: Tensor) -> None:
    """Give every BN random affine parameters and statistics near those of the images, and replace all-zero parameters.

    Then images reach the output, and no mistake hides behind a fresh BN or a zero.
    """
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))

    def disturb(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(norm, BatchNorm)
        running_mean, running_var = running_stats(norm)
        shape = running_mean.shape
        values = inputs[0].transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(values, dim=1, correction=0)
        running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn(shape, generator=draw))
        running_var.copy_(torch.where(var > 0, var, 1.0) * (0.5 + torch.rand(shape, generator=draw)))
        if norm.weight is not None:
            norm.weight.copy_(0.5 + torch.rand(shape, generator=draw))
        if norm.bias is not None:
            norm.bias.copy_(0.1 * torch.randn(shape, generator=draw))

    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(disturb) for norm in norms]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
