"""Find sums of parallel convolutions in any module's forward, and replace each by one convolution.

The module that computes the sum is traced by `torch.fx`. All terms of a sum read one value; everything between that
value and the sum, a norm after the sum included, is read as one convolution over taps. The result does not depend on
the values of weights, so the same module is changed in the same way when its file is opened again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from repan_cli.blocks import RepBlock
from repan_cli.blocks.affine import ConvMap, as_convolution, size
from repan_cli.errors import InputError
from repan_cli.models.linear_ops import IN_PLACE, BranchSum, Reader, is_layer
from repan_cli.models.timm_blocks import PLACE, has_place_for_merged, with_merged
from repan_cli.system.text import first_line

CALLS = ("call_function", "call_method")


@dataclass(frozen=True)
class Sum:
    """A sum in a traced module.

    All terms read the value of `source`; the sum is the value of `sink`; `inner` are the nodes between them and `sink`
    itself. `found` is the convolution that replaces them, and `place` its name in the module.
    """

    place: str
    source: fx.Node
    sink: fx.Node
    inner: tuple[fx.Node, ...]
    found: ConvMap


class _Tracer(fx.Tracer):
    """Traces into modules. A module that cannot be traced, or that `whole` selects by name, stays one node."""

    def __init__(self, whole: Callable[[str], bool] = lambda name: False) -> None:
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = super().is_leaf_module(m, module_qualified_name)
        return own or is_layer(m) or self._whole(module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        last, stack = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.is_leaf_module(m, self.path_of_module(m)):
                raise
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make arguments without a default inputs of the graph; the others keep their default values."""
        _, *parameters = inspect.signature(inspect.unwrap(root_fn)).parameters.values()
        if any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in parameters):
            raise ValueError("its forward takes any arguments")
        given = [
            self.create_proxy("placeholder", each.name, (), {}) if each.default is each.empty else each.default
            for each in parameters
        ]
        return root_fn, [self.root, *given]


def trace(module: nn.Module) -> fx.Graph:
    """Return the forward of a module in eval mode as a graph, including the work of its children.

    Raises ValueError if it cannot be traced, for example if it branches on the size of the images.
    """
    try:
        return _Tracer().trace(module)
    except Exception as error:
        raise ValueError(f"its forward cannot be traced: {first_line(error)}") from error


def _traced_around(module: nn.Module, graph: fx.Graph, sums: list[Sum]) -> fx.Graph:
    """Trace again, and keep children that take no part in the sums as single nodes."""
    inner = {node for each in sums for node in each.inner}
    touched = {
        name for node in graph.nodes if node in inner for name, _ in node.meta.get("nn_module_stack", {}).values()
    }
    return _Tracer(lambda name: name not in touched).trace(module)


# ---------------------------------------------------------------------------------------------- finding


def find(module: nn.Module, graph: fx.Graph) -> tuple[list[Sum], dict[str, str]]:
    """Return the sums in a traced module that equal one convolution, and for other sums of convolutions the reason why
    not.
    """
    reader = Reader(module, graph)
    order = {node: number for number, node in enumerate(graph.nodes)}
    dominators = _dominators(graph, reader)
    taken: set[fx.Node] = set()
    found: list[Sum] = []
    left: dict[str, str] = {}
    for sink in reversed(graph.nodes):
        if sink in taken or sink in reader.constants or sink.op in ("placeholder", "output"):
            continue
        source = dominators.get(sink)
        while source is not None:
            inner = reader.between(source, sink)
            if any(_adds_from(source, node, inner, reader) for node in inner):
                break
            source = dominators.get(source)
        if source is None:
            continue
        try:
            merged = _as_sum(module, reader, source, sink, inner, order)
        except ValueError as error:
            if reader.terms(sink) and _is_of_branches(reader, source, sink):
                left[_place(module, graph, inner)] = str(error)
            continue
        found.append(merged)
        taken.update(inner)
    return found[::-1], left


def _dominators(graph: fx.Graph, reader: Reader) -> dict[fx.Node, fx.Node]:
    """Return each node's immediate dominator: the nearest node that every path to it passes through."""
    chains: dict[fx.Node, list[fx.Node]] = {}
    nearest: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in reader.constants:
            continue
        above = [chains[each] for each in node.all_input_nodes if each in chains]
        if above:
            shared = set(above[0]).intersection(*above[1:])
            common = [each for each in above[0] if each in shared]
            chains[node] = [*common, node]
            if common:
                nearest[node] = common[-1]
        else:
            chains[node] = [node]
    return nearest


def _adds_from(source: fx.Node, node: fx.Node, inner: list[fx.Node], reader: Reader) -> bool:
    """Return whether a node adds values that all depend on one other node."""
    terms = reader.terms(node)
    return bool(terms) and all(term is source or term in inner for term, _ in terms)


def _as_sum(
    module: nn.Module,
    reader: Reader,
    source: fx.Node,
    sink: fx.Node,
    inner: list[fx.Node],
    order: Mapping[fx.Node, int],
) -> Sum:
    """Return a sum as one convolution. Raises ValueError, with the reason, if it is not one or would be larger."""
    found = reader.read(sink, source)
    nodes = sorted(inner, key=order.__getitem__)
    for node in nodes:
        if node is not sink and any(user not in inner for user in node.users):
            raise ValueError("the output of one of its branches is also used elsewhere")
        if node.target in IN_PLACE or node.kwargs.get("inplace"):
            _check_in_place(node, source, order)
    weights = _weights(module, nodes)
    if not weights:
        raise ValueError("it has no weights")
    if size(found) > weights:
        raise ValueError(f"one convolution would be larger ({size(found):,} weights, not {weights:,})")
    as_convolution(found)
    return Sum(_place(module, sink.graph, nodes), source, sink, tuple(nodes), found)


def _check_in_place(node: fx.Node, source: fx.Node, order: Mapping[fx.Node, int]) -> None:
    changed = node.args[0]
    if changed is source or (isinstance(changed, fx.Node) and any(order[user] > order[node] for user in changed.users)):
        raise ValueError("it changes in place a tensor that is used elsewhere")


def _weights(module: nn.Module, nodes: list[fx.Node]) -> int:
    """Return the number of weights, without biases, in the layers of a sum; pooling counts one kernel per channel."""
    total, channels = 0, 1
    pools: list[int] = []
    for node in nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            sizes = [p.numel() for p in layer.parameters() if p.ndim == 4]
            total += sum(sizes) or sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name)
            channels = max([channels, *(len(p) for p in layer.parameters())])
            if isinstance(layer, nn.AvgPool2d):
                pools.append(_area(layer.kernel_size))
        else:
            held = [each for each in node.all_input_nodes if each.op == "get_attr"]
            tensors = [t for each in held if isinstance(t := _attribute(module, str(each.target)), torch.Tensor)]
            total += max((t.numel() for t in tensors), default=0)
            channels = max([channels, *(max(t.shape) for t in tensors if t.ndim)])
            if node.target is torch.nn.functional.avg_pool2d:
                given = node.args[1] if len(node.args) > 1 else node.kwargs.get("kernel_size")
                pools.append(_area(given))
    return total + channels * sum(pools)


def _area(size: Any) -> int:
    return size * size if isinstance(size, int) else int(torch.tensor(size).prod())


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _is_of_branches(reader: Reader, source: fx.Node, sink: fx.Node) -> bool:
    """Return whether at least two terms of a sum are, each by itself, convolutions of the same value."""

    def reads(term: fx.Node) -> bool:
        try:
            return term is not source and bool(reader.read(term, source).taps)
        except ValueError:
            return False

    return sum(reads(term) for term, _ in _flat(reader, sink)) > 1


def _flat(reader: Reader, node: fx.Node) -> Iterator[tuple[fx.Node, float]]:
    """Yield the terms of nested sums, with their factors."""
    for term, factor in reader.terms(node):
        inside = [*_flat(reader, term)] if len(term.users) == 1 else []
        yield from ((each, by * factor) for each, by in inside) if inside else [(term, factor)]


def _place(module: nn.Module, graph: fx.Graph, nodes: list[fx.Node]) -> str:
    """Return the name for the merged convolution: that of the first convolution in the sum, else of its first layer."""
    if has_place_for_merged(module):
        return PLACE
    order = {node: number for number, node in enumerate(graph.nodes)}
    called = [str(n.target) for n in sorted(nodes, key=order.__getitem__) if n.op == "call_module"]
    convs = [name for name in called if isinstance(module.get_submodule(name), (nn.Conv2d, RepBlock))]
    name = next(iter([*convs, *called]), "merged")
    elsewhere = {str(n.target) for n in graph.nodes if n not in nodes and n.op in ("call_module", "get_attr")}
    taken = any(each == name or each.startswith(f"{name}.") for each in elsewhere)
    return f"{name}_merged" if taken or (name == "merged" and hasattr(module, name)) else name


# ---------------------------------------------------------------------------------------------- replacing


@torch.no_grad()
def merge(module: nn.Module, places: list[str] | None = None, *, whole: bool = False) -> nn.Module:
    """Return a module in which one convolution replaces each sum; the given module is unchanged.

    Args:
        module: the module; it is read in eval mode, whatever its mode.
        places: the names of the convolutions to make; None makes all.
        whole: put a `BranchSum`, which computes the sum as before, in each place instead of a convolution.

    Raises InputError for a place without such a sum.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        graph = trace(module)
        sums, _ = find(module, graph)
        chosen = {each.place for each in sums} if places is None else set(places)
        if missing := chosen - {each.place for each in sums}:
            raise ValueError(f"there is no sum of convolutions at {min(missing)}")
        graph = _traced_around(module, graph, [each for each in sums if each.place in chosen])
        sums = [each for each in find(module, graph)[0] if each.place in chosen]
    except ValueError as error:
        raise InputError(f"{type(module).__name__} does not merge as it did: {error}") from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    layers: dict[str, nn.Module] = {}
    for each in sums:
        conv = as_convolution(each.found).to(like.device, like.dtype).requires_grad_(like.requires_grad)
        layers[each.place] = _layer_of(module, graph, each) if whole else conv
    merged_nodes: dict[fx.Node, fx.Node] = {}
    for each in sums:
        merged_nodes[each.sink] = _replace(graph, each, merged_nodes.get(each.source, each.source))
    for layer in layers.values():
        layer.train(module.training)
    if has_place_for_merged(module):
        return with_merged(module, layers[PLACE])
    attributes = {str(node.target): node for node in graph.nodes if node.op in ("call_module", "get_attr")}
    held = {name: layers[name] if name in layers else _attribute(module, name) for name in attributes}
    merged = MergedModule(held, graph, class_name=type(module).__name__)
    _keep_attributes(module, merged)
    merged.training = module.training
    for name, layer in merged.named_modules():
        if name and not isinstance(layer, fx.GraphModule) and type(layer) is nn.Module:
            layer.training = module.training  # a holder that fx made
    return merged


class MergedModule(fx.GraphModule):
    """A module as it was traced, with its sums merged.

    It keeps the plain attributes of the module, such as a number of channels that other modules read, also in copies.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        _keep_attributes(self, copied)
        return copied


PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def _keep_attributes(module: nn.Module, merged: nn.Module) -> None:
    for name, value in vars(module).items():
        if name not in vars(merged) and _is_plain(value):
            vars(merged)[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _replace(graph: fx.Graph, found: Sum, source: fx.Node) -> fx.Node:
    """Replace a sum in a graph, and return its node; `source` is the present node of its source, which may be a sum."""
    with graph.inserting_before(found.sink):
        node = graph.call_module(found.place, (source,))
    found.sink.replace_all_uses_with(node)
    for inner in reversed(found.inner):
        graph.erase_node(inner)
    for each in reversed(graph.nodes):  # constants that only it has read
        if not each.users and (each.op == "get_attr" or (each.op in CALLS and not _has_inputs(each))):
            graph.erase_node(each)
    return node


def _has_inputs(node: fx.Node) -> bool:
    return any(each.op in ("placeholder", "call_module") or _has_inputs(each) for each in node.all_input_nodes)


def _layer_of(module: nn.Module, graph: fx.Graph, found: Sum) -> nn.Module:
    """Return a layer that computes a sum as its module does, branch by branch."""
    part = fx.Graph()
    known = {found.source: part.placeholder("x")}
    needed = {*found.inner} | {each for node in found.inner for each in _constants(node, found)}
    for node in graph.nodes:
        if node in needed:
            known[node] = part.node_copy(node, known.__getitem__)
    part.output(known[found.sink])
    names = [str(node.target) for node in part.nodes if node.op in ("call_module", "get_attr")]
    return BranchSum(fx.GraphModule({name: _attribute(module, name) for name in names}, part))


def _constants(node: fx.Node, found: Sum) -> Iterator[fx.Node]:
    for each in node.all_input_nodes:
        if each is not found.source and each not in found.inner:
            yield each
            yield from _constants(each, found)
