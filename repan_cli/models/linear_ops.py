"""Read the linear operations of a traced network, layers and functions alike, as convolutions over taps."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repan_cli.blocks import Geometry, RepBlock
from repan_cli.blocks.affine import IDENTITY, ConvMap, added, behind, convolution, regrouped, scaling
from repan_cli.blocks.kernel import BatchNorm, conv_kernel, exact, norm_affine
from repan_cli.models.linear_functions import (
    FUNCTIONS,
    NAMES,
    OF_POOL,
    SIDES,
    Arguments,
    average,
    of_channels,
    padding_of,
)
from repan_cli.models.norms import activation_of, check_norm, is_fixed, is_norm

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PADS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)

PLUS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__", "__iadd__")
MINUS = (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_")
TIMES = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
OVER = (operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_")
NEGATED = (operator.neg, torch.neg, torch.negative, "neg")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, "add_", "sub_", "mul_", "div_", "neg_")
COPIES = ("contiguous", "clone", "detach", torch.clone)
DROPOUTS = (F.dropout, F.dropout2d, torch.dropout)
STACKS = (torch.stack,)
SUMS = (torch.sum, "sum")
MEANS = (torch.mean, "mean")
KNOWN = {
    *(*PLUS, *MINUS, *TIMES, *OVER, *NEGATED, *COPIES, *DROPOUTS, *STACKS, *SUMS, *MEANS),
    *(function for functions, _ in FUNCTIONS for function in functions),
}
"""Functions and methods that are linear for some arguments."""


class Reader:
    """Reads nodes of a traced module as linear maps of another node's value. `constants` are the nodes that no input
    reaches.

    All methods raise ValueError, with the reason, for operations that are not a convolution.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self._values: dict[fx.Node, Any] = {}
        self.constants: set[fx.Node] = set()
        for node in graph.nodes:
            known = all(each in self.constants for each in node.all_input_nodes)
            if node.op == "get_attr" or (node.op in ("call_function", "call_method") and known):
                self.constants.add(node)

    def read(self, node: fx.Node, source: fx.Node) -> ConvMap:
        """Return the linear map from the value of `source` to the value of `node`."""
        for each in self.between(source, node):  # before any kernel is computed
            self._check_kind(each)
        return self._read(node, {source: IDENTITY})

    def between(self, source: fx.Node, sink: fx.Node) -> list[fx.Node]:
        """Return the nodes on the paths from `source` to `sink`, `sink` included."""
        found: dict[fx.Node, None] = {}
        pending = [sink]
        while pending:
            node = pending.pop()
            if node is not source and node not in found and node not in self.constants:
                found[node] = None
                pending += node.all_input_nodes
        return [*found]

    def _check_kind(self, node: fx.Node) -> None:
        """Raise ValueError for an operation that is not linear for any arguments."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if type(module).__module__.startswith("torch.nn.") and not is_layer(module):
                raise ValueError(
                    f"the layer {type(module).__name__} is not a convolution, norm, average pooling or padding"
                )
        elif node.op not in ("call_function", "call_method"):
            raise ValueError(f"{_name(node)} is not one of its layers")
        elif node.target not in KNOWN:
            raise ValueError(f"{_name(node)} is not a convolution, norm, average pooling or padding")

    def terms(self, node: fx.Node) -> list[tuple[fx.Node, float]]:
        """Return the values that a node adds, with their signs; an empty list if the node is not a sum."""
        if node.target in (*PLUS, *MINUS) and len(node.args) == 2 and not node.kwargs:
            sign = -1.0 if node.target in MINUS else 1.0
            rows = [(each, by) for each, by in zip(node.args, (1.0, sign), strict=True) if self._is_variable(each)]
            return cast("list[tuple[fx.Node, float]]", rows) if len(rows) == 2 else []
        if node.target in (*SUMS, *MEANS) and node.args and self._first_dimension(node):
            stack = node.args[0]
            if isinstance(stack, fx.Node) and stack.target in STACKS and self._first_dimension(stack, default=True):
                parts = cast("list[fx.Node]", stack.args[0] if stack.args else stack.kwargs["tensors"])
                share = 1 / len(parts) if node.target in MEANS else 1.0
                return [(part, share) for part in parts] if all(map(self._is_variable, parts)) else []
        return []

    def _is_variable(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value not in self.constants

    @staticmethod
    def _first_dimension(node: fx.Node, *, default: bool = False) -> bool:
        named = [value for key, value in node.kwargs.items() if key not in ("input", "tensors")]
        given = [*node.args[1:], *named]
        return given in ([0], [[0]], [(0,)], [0, False]) or (default and not given)

    def _read(self, node: fx.Node, known: dict[fx.Node, ConvMap]) -> ConvMap:
        if node not in known:
            known[node] = self._operation(node, known)
        return known[node]

    def _operation(self, node: fx.Node, known: dict[fx.Node, ConvMap]) -> ConvMap:
        terms = self.terms(node)
        if terms:
            return added((self._read(term, known), factor) for term, factor in terms)
        inputs = [each for each in node.all_input_nodes if each not in self.constants]
        if len(inputs) != 1:
            raise ValueError(f"{_name(node)} is not part of a sum of convolutions")
        before = self._read(inputs[0], known)
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return behind(before, layer(module, before.channels))
        if node.op in ("call_function", "call_method"):
            return behind(before, self._function(node, inputs[0]))
        raise ValueError(f"{_name(node)} is not one of its layers")

    # ------------------------------------------------------------------------------------------ functions

    def _function(self, node: fx.Node, source: fx.Node) -> ConvMap:
        target, given = node.target, self._arguments(node, source)
        if target in (*PLUS, *MINUS, *TIMES, *OVER) and len(node.args) == 2 and not node.kwargs:
            return self._with_constant(node, source, given)
        if target in NEGATED:
            return scaling(-torch.ones((), dtype=torch.float64))
        if target in COPIES or (target in DROPOUTS and not given.get("training", True)):
            return IDENTITY
        for functions, read in FUNCTIONS:
            if target in functions:
                return read(given)
        raise ValueError(f"{_name(node)} is not a convolution, norm, average pooling or padding")

    def _arguments(self, node: fx.Node, source: fx.Node) -> Arguments:
        def value(each: Any) -> Any:
            if isinstance(each, fx.Node):
                return None if each is source else self.value(each)
            if isinstance(each, slice):
                return slice(value(each.start), value(each.stop), value(each.step))
            return type(each)(map(value, each)) if isinstance(each, (list, tuple)) else each

        names = NAMES.get(node.target, ())
        placed = {names[i] if i < len(names) else i: value(each) for i, each in enumerate(node.args)}
        return {**placed, **{key: value(each) for key, each in node.kwargs.items()}}

    def value(self, node: fx.Node) -> Any:
        """Return the value of a constant."""
        if node not in self.constants:
            raise ValueError(f"{_name(node)} depends on the images")
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = operator.attrgetter(str(node.target))(self.root)
            else:
                args = fx.map_arg(node.args, self.value)
                kwargs = fx.map_arg(node.kwargs, self.value)
                call = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
                self._values[node] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)  # type: ignore[operator]
        return self._values[node]

    def _with_constant(self, node: fx.Node, source: fx.Node, given: Arguments) -> ConvMap:
        """Read a sum or product with a constant: one number, or one per channel."""
        behind_it = node.args[0] is source
        constant = of_channels(given[1] if behind_it else given[0])
        target = node.target
        if target in TIMES:
            return scaling(constant)
        if target in OVER and behind_it:
            return scaling(1 / constant)
        if target in (*PLUS, *MINUS):
            sign = torch.ones((), dtype=torch.float64)
            if not isinstance(given[1 if behind_it else 0], Tensor) and not constant.any():
                return IDENTITY if behind_it or target in PLUS else scaling(-sign)  # 0 + x, of sum()
            if target in MINUS:
                sign, constant = (sign, -constant) if behind_it else (-sign, constant)
            return scaling(sign, constant)
        raise ValueError(f"{_name(node)} divides by its values")


def _name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the input"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"'{target}'"


# ---------------------------------------------------------------------------------------------- layers


class BranchSum(nn.Module):
    """A layer that computes a sum of branches as its module did, branch by branch."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found

    def as_map(self) -> ConvMap:
        """Return the convolution that the sum equals."""
        first, last = next(iter(self.body.graph.nodes)), self.body.graph.output_node().args[0]
        assert isinstance(last, fx.Node)
        return Reader(self.body, self.body.graph).read(last, first)


class NormBehind(nn.Sequential):
    """A block or a sum of branches, and the norm that reads it, as one layer."""


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is read by its type, without tracing its forward."""
    known = isinstance(module, (RepBlock, BranchSum, BatchNorm, *PADS, *NOTHING, nn.AvgPool2d))
    return known or type(module) is nn.Conv2d or is_fixed(module)


def layer(module: nn.Module, channels: int | None) -> ConvMap:
    """Return the linear map of a module in eval mode; `channels` is the number of its input channels, if known."""
    if isinstance(module, RepBlock):
        return _of_geometry(Geometry.of(module.trunk.conv), module.equivalent_kernel(), bias=True)
    if isinstance(module, BranchSum):
        return module.as_map()
    if type(module) is nn.Conv2d:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError("it has hooks, such as those of weight norm, or a forward of its own")
        return _of_geometry(Geometry.of(module), conv_kernel(module), bias=module.bias is not None)
    if is_norm(module):
        return _of_norm(module)
    if type(module) is nn.AvgPool2d:
        return average({key: getattr(module, key) for key in OF_POOL[1:]})
    if type(module) in NOTHING:
        return IDENTITY
    if type(module) in PADS:
        return _of_padding(module)
    return _observed(module, channels)


def _of_geometry(geometry: Geometry, kernel: tuple[Tensor, Tensor], *, bias: bool) -> ConvMap:
    return convolution(
        kernel,
        bias=bias,
        groups=geometry.groups,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        mode=geometry.padding_mode,
    )


def _of_norm(module: nn.Module) -> ConvMap:
    norm = check_norm(module)
    if rest := activation_of(module):
        raise ValueError(f"its BN carries a {type(rest[-1]).__name__}")
    return scaling(*norm_affine(norm))


def _of_padding(module: nn.Module) -> ConvMap:
    kind = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate", nn.CircularPad2d: "circular"}
    given = {"pad": _sides(module), "mode": kind.get(type(module), "constant"), "value": getattr(module, "value", 0)}
    return padding_of(cast("Arguments", given))


def _sides(module: nn.Module) -> tuple[int, ...]:
    sides = vars(module)["padding"]
    return (sides,) * SIDES if isinstance(sides, int) else tuple(sides)


ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}


@torch.no_grad()
def _observed(module: nn.Module, channels: int | None) -> ConvMap:
    """Read a module of unknown code by its response to single pixels: a 1x1 convolution, with padding around it.

    Some multi-branch networks have layers that write the borders of a feature map by hand; their code cannot be traced.
    """
    channels = channels or next(_inputs(module), None)
    kind = f"{type(module).__name__}"
    like = next((p for p in module.parameters()), torch.zeros(()))
    if channels is None or module.training or like.dtype not in ROUNDING or like.device.type != "cpu":
        raise ValueError(f"the layer {kind} is not known")
    given = torch.cat([torch.zeros(1, channels), torch.eye(channels)]).view(-1, channels, 1, 1).to(like)
    sample = torch.randn(2, channels, 5, 4, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        found, wanted = exact(module(given)), exact(module(sample))
    except Exception as error:
        raise ValueError(f"the layer {kind} is not known") from error
    if found.ndim != SIDES or wanted.ndim != SIDES:
        raise ValueError(f"the layer {kind} does not return images")
    rest, moved = found[0], found[1:] - found[0]
    places = moved.abs().amax((0, 1)).nonzero().tolist()
    if len(places) != 1 or (rest - rest[:, :1, :1]).abs().max() > ROUNDING[like.dtype] * rest.abs().max():
        raise ValueError(f"the layer {kind} is not known")
    (row, column), (height, width) = places[0], found.shape[2:]
    matrix, bias = moved[:, :, row, column].T.contiguous(), rest[:, 0, 0]
    square = len(matrix) == channels and torch.equal(matrix, torch.diag(matrix.diagonal()))
    weight, groups = (matrix.diagonal().clone(), None) if square else _grouped(module, matrix)
    ours = torch.einsum("oi,nihw->nohw", matrix, exact(sample))
    ours = F.pad(ours, [column, width - 1 - column, row, height - 1 - row]) + bias.view(-1, 1, 1)
    if ours.shape != wanted.shape or (ours - wanted).abs().max() > ROUNDING[like.dtype] * wanted.abs().max():
        raise ValueError(f"the layer {kind} is not a convolution")
    taps = {(-row, -column): weight}
    return ConvMap(taps, bias if bias.any() else None, groups, (1, 1), (height - 1, width - 1))


def _grouped(module: nn.Module, matrix: Tensor) -> tuple[Tensor, int]:
    """Write a matrix (C_out, C_in) as a grouped kernel, with the largest number of groups of a convolution in the
    module that fits.
    """
    for groups in sorted({each.groups for each in module.modules() if isinstance(each, nn.Conv2d)}, reverse=True):
        blocks = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        weight = torch.cat([blocks[group, :, group] for group in range(groups)])
        if torch.equal(regrouped(weight, groups, 1), matrix):
            return weight, groups
    return matrix, 1


def _inputs(module: nn.Module) -> Iterator[int]:
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            yield each.in_channels
        elif isinstance(each, BatchNorm):
            yield each.num_features
