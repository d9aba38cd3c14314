"""Prove that a merged network equals the original, in float64: each block by itself, and the network's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from repan_cli.blocks import RepBlock
from repan_cli.checkpoint.card import Change
from repan_cli.errors import MergeError
from repan_cli.models.changes import apply, put
from repan_cli.models.linear_ops import BranchSum, NormBehind
from repan_cli.models.merging import MergePlan
from repan_cli.models.norms import split_norm
from repan_cli.models.outputs import Leaves, difference, differences, inner_modules, inner_outputs, leaves
from repan_cli.models.probe import CEILING, NUDGE, noise
from repan_cli.models.rebuild import NothingIsDrawn
from repan_cli.models.twins import twin
from repan_cli.system.text import first_line

TOLERANCE = 1e-10
"""The limit on the relative error in float64: a correct merge has 1e-15, a wrong one 1e-2."""

JUMP = 1e-2
"""If rounding to float32 changes an output by more than this, the output says nothing about a merge: it makes choices,
as detectors do.
"""

MOST_WORK = 10**9
"""The largest number of multiplications for a block on noise as large as its kernel, besides the input that it gets."""


@dataclass(frozen=True)
class Errors:
    """The relative errors of a merged network in float64.

    Attributes:
        of_blocks: the error of each block on its own input, by name.
        of_outputs: the errors of all outputs of the network. If outputs say nothing, the errors of the outputs of the
            modules `parts` instead.
        problem: what is wrong with these errors.
        parts: the names of these modules.
    """

    of_blocks: Mapping[str, float]
    of_outputs: Mapping[str, float]
    problem: MergeError | None = None
    parts: frozenset[str] = frozenset()

    def compared(self, model: nn.Module, images: Tensor) -> Leaves:
        """Return those outputs, of the network or its parts, that tell whether the network is the same."""
        if not self.parts:
            return leaves(model(images))
        found = inner_outputs(model, images, self.parts)
        return {name: value for name, value in found.items() if name in self.of_outputs}


def errors_of(merged: nn.Module, exact: nn.Module, found: MergePlan, images: Tensor, expected: Leaves) -> Errors:
    """Compare a merged network with the original, which returns `expected` for the images."""
    blocks: dict[str, float] = {}
    try:
        with _compared(merged, found, blocks) as blocked:
            blocked(images)
        outputs = leaves(merged(images))
    except Exception as error:  # a network that lost a layer may raise anything
        problem = MergeError(f"merging broke the network: {first_line(error)}; nothing was written")
        return Errors(blocks, {}, problem)
    return _of_outputs(Errors(blocks, dict(differences(outputs, expected))), merged, exact, images, expected)


def _of_outputs(found: Errors, merged: nn.Module, exact: nn.Module, images: Tensor, expected: Leaves) -> Errors:
    """Judge the errors of the outputs or, if outputs say nothing, those of the larger parts of the network."""
    tells = any(value.numel() for value in expected.values())
    wrong = {name: error for name, error in found.of_outputs.items() if not error <= TOLERANCE}
    if wrong:
        nudged = dict(differences(leaves(exact(images * (1 + NUDGE))), expected))
        wrong = {name: e for name, e in wrong.items() if not e <= min(nudged.get(name, 0.0), CEILING)}
        rounded = dict(differences(_in_float32(exact, images), expected)) if wrong else {}
        jumping = {name for name in wrong if nudged.get(name, 0.0) > CEILING or rounded.get(name, 0.0) > JUMP}
        for name in wrong.keys() - jumping:
            return Errors(found.of_blocks, {}, changed(f"the output {name}" if name else "the logits", wrong[name]))
        tells = tells and not jumping
    if tells:
        return found
    parts = frozenset(inner_modules(exact) & inner_modules(merged))
    return Errors(found.of_blocks, *_of_parts(parts, merged, exact, images), parts)


def _in_float32(model: nn.Module, images: Tensor) -> Leaves:
    found = leaves(copy.deepcopy(model).float()(images.float()))
    return {name: value.double() for name, value in found.items()}


def _of_parts(
    names: frozenset[str], merged: nn.Module, exact: nn.Module, images: Tensor
) -> tuple[dict[str, float], MergeError | None]:
    """Return the errors of the outputs of a network's larger parts, and what is wrong with them.

    A detector may find nothing in the images, and its results may jump when two scores are nearly equal. Its backbone
    and its heads do not.
    """
    expected = inner_outputs(exact, images, names)
    nudged = dict(differences(inner_outputs(exact, images * (1 + NUDGE), names), expected))
    errors = dict(differences(inner_outputs(merged, images, names), expected))
    smooth = [name for name, value in expected.items() if value.numel() and nudged[name] <= CEILING]
    if not smooth:
        return {}, MergeError("no output of the network for these images can be compared; nothing was written")
    wrong = [name for name in smooth if not errors[name] <= max(TOLERANCE, nudged[name])]
    return {name: errors[name] for name in smooth}, changed(wrong[0], errors[wrong[0]]) if wrong else None


@contextmanager
def _compared(merged: nn.Module, found: MergePlan, errors: dict[str, float]) -> Iterator[nn.Module]:
    """Make every block of a network compare itself with its convolution, and note its largest error."""
    blocked = twin(found.adapted, blocks=lambda block: block)
    with NothingIsDrawn():
        blocked = apply(blocked, found.sums, whole=True)
        for change in found.folds:
            _fold(blocked, change)
    convs = {name: conv for name, conv in merged.named_modules() if isinstance(conv, nn.Conv2d)}
    hooks = [
        block.register_forward_hook(_comparison(name, convs[name], errors))
        for name, block in blocked.named_modules()
        if isinstance(block, (RepBlock, BranchSum, NormBehind)) and name in convs
    ]
    try:
        yield blocked
    finally:
        for hook in hooks:
            hook.remove()


def _fold(blocked: nn.Module, change: Change) -> None:
    """Put the norm that a convolution absorbs after the layer that the convolution is made of."""
    layer = blocked.get_submodule(change.name)
    if change.norm is None or not isinstance(layer, (RepBlock, BranchSum)):
        apply(blocked, [change])
        return
    norm, rest = split_norm(blocked.get_submodule(change.norm))
    put(blocked, change.norm, rest.eval())
    put(blocked, change.name, NormBehind(layer, norm))


def _comparison(
    name: str, conv: nn.Conv2d, errors: dict[str, float]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    reach = max(d * (k - 1) + s for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)) + 1

    def compare(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pairs = [(inputs[0], output)]
        if min(inputs[0].shape[-2:]) < reach and conv.weight.numel() * reach**2 <= MOST_WORK:
            x = noise(1, conv.in_channels, reach, reach).double()  # every weight meets an image in it
            pairs.append((x, type(block).forward(block, x)))
        errors[name] = max(errors.get(name, 0.0), *(difference(leaves(conv(x)), leaves(y)) for x, y in pairs))

    return compare


def changed(name: str, error: float) -> MergeError:
    """Return the error that reports a wrong merge."""
    return MergeError(
        f"merging changed the function at {name}: relative error {error:.1e} in float64; nothing was written"
    )
