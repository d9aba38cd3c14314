"""Convert ONNX graphs for older runtimes: the same operators, in an earlier version of ONNX's operator set.

onnx converts most of them. It lacks steps in which an operator only lost types or an unused input; these are done here.
An operator is declared to be of an earlier version only after a check that it has the same inputs, attributes and
defaults there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from repan_cli.config.conventions import OPSET, OPSETS
from repan_cli.errors import InputError
from repan_cli.system.text import first_line

CONVERTED = 14
"""The lowest version to which onnx converts the operators of image networks."""


def at_opset(model: Any, opset: int) -> Any:
    """Return a torch.onnx model at an opset. Raises InputError, naming the operators that need a later one."""
    from onnx import helper

    without_new_attributes(model)
    try:
        found = model if opset == OPSET else _converted(model, opset)
        found.ir_version = min(found.ir_version, helper.find_min_ir_version_for(found.opset_import))
        return found
    except Exception as error:
        held = [other for other in OPSETS if _can_hold(model, other)]
        fits = f"choose from {held[0]} to {held[-1]}" if held else "none of those offered can"
        raise InputError(f"does not fit into opset {opset} ({_reason(error)}): {fits}") from error


def _can_hold(model: Any, opset: int) -> bool:
    try:
        _converted(model, opset)
    except Exception:
        return False
    return True


def _converted(model: Any, opset: int) -> Any:
    """Return a model at another opset: converted by onnx, or relabeled, or first one and then the other."""
    import onnx
    from onnx import version_converter

    def relabelled(given: Any, since: int) -> Any:
        return _relabelled(copy.deepcopy(given), since, opset)

    ways: list[Callable[[], Any]] = [lambda: relabelled(model, OPSET)]
    if opset >= CONVERTED:
        ways.insert(0, lambda: version_converter.convert_version(model, opset))
    else:
        ways.append(lambda: relabelled(version_converter.convert_version(model, CONVERTED), CONVERTED))
    problems = []
    for way in ways:
        try:
            found = way()
            onnx.checker.check_model(found, full_check=True)
            return found
        except Exception as error:
            problems.append(error)
    raise problems[0]


def _relabelled(model: Any, since: int, opset: int) -> Any:
    """Declare an opset in which a model's operators differ only in types.

    Raises ValueError if they differ otherwise.
    """
    from onnx import defs

    if since < opset:
        raise ValueError("no operator of a later version")
    if opset < CONVERTED:
        _replace_hard_swish(model.graph)
    constants = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        try:
            now, before = (defs.get_schema(node.op_type, version, node.domain) for version in (since, opset))
        except defs.SchemaError:
            raise ValueError(f"{node.op_type} is not in it") from None
        _as_before(node, now, before, constants)
        _check_same(node, now, before)
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx"):
            each.version = opset
    return model


def _check_same(node: Any, now: Any, before: Any) -> None:
    """Raise ValueError if a node uses something that an earlier version of its operator lacks or defines
    differently.
    """
    inputs = [[each.name.removeprefix("input_") for each in schema.inputs] for schema in (now, before)]
    count = min(len(node.input), len(inputs[0]))  # the last one may be variadic
    defaults = [{name: _default(each) for name, each in schema.attributes.items()} for schema in (now, before)]
    shared = defaults[0].keys() & defaults[1].keys()
    if (
        inputs[0][:count] != inputs[1][:count]
        or {given.name for given in node.attribute} - defaults[1].keys()
        or any(defaults[0][name] != defaults[1][name] for name in shared)
    ):
        raise ValueError(f"{node.op_type} was another operator in it")


def _as_before(node: Any, now: Any, before: Any, constants: dict[str, Any]) -> None:
    """Give a node its constant axes or sizes as an attribute, if an earlier version of its operator expects them so.

    Split makes as many parts as it has outputs in any version; the checker refuses parts of unequal size.
    """
    from onnx import helper, numpy_helper

    if len(node.input) == 2 and len(before.inputs) == 1 and node.input[1] in constants:
        name = now.inputs[1].name
        if name in before.attributes:
            values = numpy_helper.to_array(constants[node.input[1]]).tolist()
            del node.input[1]
            node.attribute.append(helper.make_attribute(name, values))
    if node.op_type == "Split" and "num_outputs" not in before.attributes:
        for given in [each for each in node.attribute if each.name == "num_outputs"]:
            node.attribute.remove(given)


def _default(attribute: Any) -> tuple[bool, bytes]:
    return attribute.required, attribute.default_value.SerializeToString(deterministic=True)


def _replace_hard_swish(graph: Any) -> None:
    """Write x * HardSigmoid(x) for HardSwish(x), which versions below 14 lack."""
    from onnx import helper

    nodes = []
    for node in graph.node:
        if node.op_type != "HardSwish":
            nodes.append(node)
            continue
        (given,), (result,) = node.input, node.output
        gate = f"{result}_gate"
        nodes.append(helper.make_node("HardSigmoid", [given], [gate], name=gate, alpha=1 / 6, beta=0.5))
        nodes.append(helper.make_node("Mul", [given, gate], [result], name=node.name))
    del graph.node[:]
    graph.node.extend(nodes)


def without_new_attributes(model: Any) -> None:
    """Remove attributes that change nothing here, and that older versions and their converters do not know."""
    from onnx import numpy_helper

    constants = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        for given in [*node.attribute]:
            needless = given.name == "noop_with_empty_axes" and not given.i
            if given.name == "allowzero" and node.input[1] in constants:
                needless = 0 not in numpy_helper.to_array(constants[node.input[1]])
            if needless:
                node.attribute.remove(given)


def _reason(error: Exception) -> str:
    """Return the message of onnx, without its file names and conditions."""
    return first_line(error).rpartition("failed: ")[2]
