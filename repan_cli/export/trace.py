"""Trace the network as a graph, from which both `.onnx` and `.pt2` files are made."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repan_cli.errors import InputError
from repan_cli.models.outputs import leaves
from repan_cli.system.text import first_line

ABOUT_PYTHON = ("stack_trace", "from_node", "source_fn_stack")
"""The keys under which a graph's nodes describe the Python code they came from, paths included."""


class Normalized(nn.Module):
    """A network that takes images with values from 0 to 1 and normalizes them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


class PlainOutputs(nn.Module):
    """A network that returns plain dictionaries, lists and tuples instead of its own types."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return _plain(self.network(images))


def _plain(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {str(key): _plain(part) for key, part in output.items()}
    if isinstance(output, (list, tuple)):
        parts = [_plain(part) for part in output]
        return parts if isinstance(output, list) else tuple(parts)
    return output


@torch.no_grad()
def trace(network: nn.Module, images: Tensor, name: str) -> ExportedProgram:
    """Return the graph of a network in eval mode, for batches of any size of images like these, (N, C, H, W), N above
    1.

    It contains nothing about the machine it was made on, so the same network gives the same graph. Raises InputError
    for a network that cannot be traced.
    """
    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)
    try:
        with quiet():
            found = network(images[:2])
            if any(isinstance(part, (str, bytes)) for part in pytree.tree_leaves(found)):
                raise ValueError("it returns text beside its tensors")
            network = network if isinstance(found, Tensor) else PlainOutputs(network)
            program = torch.export.export(network, (images[:2].contiguous(),), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise InputError(f"{name} cannot be exported as a graph: {first_line(error)}") from error
    return without_places(program)


def output_names(program: ExportedProgram) -> list[str]:
    """Return the places of a graph's outputs, such as `out` in a dictionary; '' for a single tensor."""
    spec = program.call_spec.out_spec
    assert spec is not None, "a program that was traced knows what it returns"
    found = leaves(pytree.tree_unflatten([torch.empty(()) for _ in range(spec.num_leaves)], spec))
    return [*found]


def without_places(program: ExportedProgram) -> ExportedProgram:
    """Remove, in place, the description of the Python code that a graph came from."""
    for node in program.graph.nodes:
        for key in ABOUT_PYTHON:
            node.meta.pop(key, None)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters, which print much for their developers, also to stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    aside = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(aside), contextlib.redirect_stdout(aside):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
