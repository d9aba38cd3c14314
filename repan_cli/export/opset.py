"""ONNX graphs for older runtimes: the same operators, in an earlier version of ONNX's set of them.

onnx converts most; below 14 it lacks steps in which an operator only lost types, which are taken here.
"""

from __future__ import annotations

from typing import Any

from repan_cli.errors import InputError
from repan_cli.system.text import first_line

OPSET = 18
"""The version that torch.onnx writes, and that files have where none is asked for."""

OPSETS = range(11, 22)
"""The versions that are offered, each tried in ONNX Runtime by a test."""

CONVERTED = 14
"""The lowest version that onnx converts the operators of image networks to."""


def check_opset(opset: int) -> None:
    """Raise InputError for a version that is not offered."""
    if opset not in OPSETS:
        raise InputError(f"--opset {opset} is not offered: choose from {OPSETS[0]} to {OPSETS[-1]}")


def at_opset(model: Any, opset: int) -> Any:
    """Return a model of torch.onnx at an opset. Raises InputError, naming those that hold it, where it does not fit."""
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
    import onnx
    from onnx import version_converter

    model = version_converter.convert_version(model, max(opset, CONVERTED))
    if opset < CONVERTED:
        _relabel(model, opset)
    onnx.checker.check_model(model, full_check=True)
    return model


def _relabel(model: Any, opset: int) -> None:
    """Declare an opset in which a model's operators differ in types alone. Raises ValueError where they do not."""
    from onnx import defs

    _replace_hard_swish(model.graph)
    for node in model.graph.node:
        since, before = (defs.get_schema(node.op_type, version, node.domain) for version in (CONVERTED, opset))
        known = {name: _default(attribute) for name, attribute in before.attributes.items()}
        new = {name: _default(attribute) for name, attribute in since.attributes.items()}
        used = {given.name for given in node.attribute}
        same_inputs = [each.name for each in since.inputs] == [each.name for each in before.inputs]
        if not same_inputs or used - known.keys() or any(new.get(name) != value for name, value in known.items()):
            raise ValueError(f"{node.op_type} was another operator in it")
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx"):
            each.version = opset


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
    """Leave out attributes that change nothing here, and that older versions, and converters to them, do not know."""
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
    """Return what onnx says, without its file names and conditions."""
    return first_line(error).rpartition("failed: ")[2]
