"""Write and open `.pt2` files: a graph as torch.export saves it, and nothing that could run code.

torch's own reader unpickles, evaluates expressions and calls whatever a file names. Here files are written without
code. A file that holds more than tensors and calls of torch's operators is refused before that reader sees it.

Compilers want an example input in the file, which PyTorch pickles. repan writes a single tensor of zeros. A pickle of
anything but tensors is refused, and PyTorch never gets it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repan_cli import checkpoint
from repan_cli.checkpoint.archive import Archive, printable
from repan_cli.checkpoint.format import CHECKSUM, DIGITS
from repan_cli.errors import InputError, is_out_of_memory
from repan_cli.export.trace import quiet, without_places
from repan_cli.system.files import to_json
from repan_cli.system.text import first_line

HEADER, INPUT = "repan.json", "images"
TENSOR = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
PAYLOADS = {
    "data/weights/model_weights_config.json": "data/weights",
    "data/constants/model_constants_config.json": "data/constants",
}
"""The entries that list a file's tensors, and the folders that hold these tensors."""

INPUTS = "data/sample_inputs/model.pt"
RECORDS = re.compile(
    rf"{TENSOR.pattern}|{'|'.join(map(re.escape, (*PAYLOADS, INPUTS)))}|models/model\.json|extra/repan\.json|"
    r"archive_format|archive_version|\.data/(version|serialization_id)|byteorder|\.format_version|\.storage_alignment|version"
)
"""All entries that an archive may have."""

EXAMPLE = re.compile(
    r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
CLASSES = ("collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2")
OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BINPERSID|BININT[12]?|BINUNICODE|NEW(FALSE|TRUE)|EMPTY_(TUPLE|DICT)|TUPLE[123]?|"
    r"(LONG_)?BIN(PUT|GET)"
)
"""The entries, classes and steps of a pickle of plain tensors: example inputs may hold nothing else."""

TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save|load|_?print|warn)\w+\.\w+|_operator\.(add|sub|mul|floordiv|truediv|mod|eq|ge|le|gt|lt)"
)
"""The calls that a graph may make: PyTorch's operators on tensors, except those on files, and arithmetic on sizes."""

EXPRESSION = re.compile(r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=True)*\)|[su]?\d+|[-+*/() ])+")
TREE_TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", None}
FORBIDDEN = {"as_operator", "as_custom_obj", "as_graph", "as_string_to_argument", "hoo_call_outputs"}


def write(program: ExportedProgram, header: dict[str, Any]) -> bytes:
    """Return the file of a graph, with a description next to it, in the form that compilers take.

    The graph is functional, and its input is called `images`. An example input is kept: zeros for a batch of two.
    """
    with quiet():
        program = _named(without_places(program.run_decompositions({})))
    (images,) = (node.meta["val"] for node in program.graph.nodes if node.name == INPUT)
    used = {str(size) for size in images.shape}
    program._range_constraints = {key: span for key, span in program.range_constraints.items() if str(key) in used}
    program._example_inputs = ((torch.zeros(2, *images.shape[1:]),), {})
    program._guards_code = []  # the reader would execute it
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={HEADER: to_json(header, sort_keys=True)})
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment
    buffer.write((len(CHECKSUM) + DIGITS).to_bytes(2, "little") + CHECKSUM)
    return checkpoint.sealed(buffer, buffer.tell())


def _named(program: ExportedProgram) -> ExportedProgram:
    """Call the only input of a graph `images`, whatever the network's own code calls it."""
    (old,) = program.graph_signature.user_inputs
    if old == INPUT:
        return program
    node = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == old)
    node.target = INPUT
    node._rename(INPUT)
    program.graph_signature.replace_all_uses(str(old), node.name)
    for entry in program.module_call_graph:
        if entry.signature is not None:
            for argument in entry.signature.inputs:
                if getattr(argument, "name", None) == old:
                    argument.name = node.name
            if entry.signature.forward_arg_names:
                entry.signature.forward_arg_names = [INPUT]
    program.graph_module.recompile()
    return program


class Pt2Network(nn.Module):
    """The network in a `.pt2` file: (N, C, H, W) to logits (N, classes)."""

    def __init__(self, content: bytes | Path) -> None:
        super().__init__()
        with _opened(content) as file:
            archive = checked(file, "the file" if isinstance(content, bytes) else content)
            with quiet():
                program = torch.export.load(archive.rewritten(TENSOR))
        self._run = [program.module()]  # in a list, since an exported module refuses eval() and train()

    def to(self, *args: Any, **kwargs: Any) -> Pt2Network:
        """Move to another device; a graph keeps its memory format."""
        device = kwargs.get("device", *args[:1])
        if device is not None:
            self._run[0].to(device)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        try:
            return self._run[0](images.contiguous())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"the graph cannot run: {first_line(error)}") from error


def open_file(path: Path) -> Pt2Network:
    """Open the network in a file. Raises InputError if it is damaged, not a .pt2 file, or holds code."""
    try:
        return Pt2Network(path)
    except InputError:
        raise
    except Exception:
        raise InputError(f"{path} is damaged, or not a torch.export file; use another copy") from None


def header(path: Path) -> str | None:
    """Return the description that repan wrote into the file."""
    try:
        with path.open("rb") as file:
            return Archive(file, path, WITHOUT_CODE).read(f"extra/{HEADER}").decode()
    except (InputError, OSError, ValueError, KeyError):
        return None


def _opened(content: bytes | Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


# ---------------------------------------------------------------------------------------------- no code

WITHOUT_CODE = "no code is run; repan fuse --format pt2 writes files without"


def checked(file: IO[bytes], name: object) -> Archive:
    """Return the archive of an open file; torch gets a new one made from it.

    Raises InputError if it holds more than tensors and calls of torch's operators, or is packed.
    """
    archive = Archive(file, name, WITHOUT_CODE)
    archive.refuse_unless(RECORDS, "a graph")
    try:
        reason = _reason_to_refuse(archive)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError):
        raise InputError(f"{name} is damaged, or not a torch.export file; use another copy") from None
    if reason:
        raise InputError(f"{name} holds {reason}: refused, {WITHOUT_CODE}")
    return archive


def _reason_to_refuse(archive: Archive) -> str | None:
    if archive.entries[INPUTS].size:
        if not _are_tensors(archive.read(INPUTS)):
            return "pickled example inputs that are more than tensors"
        archive.empty(INPUTS)
    for name in archive.entries:
        if name.endswith(".json") and not name.endswith(HEADER):
            found = json.loads(archive.read(name))
            if reason := next(_suspicious(found), None):
                return reason
            if name in PAYLOADS and (lacking := _without_bytes(archive, found, PAYLOADS[name])):
                return f"the tensor '{printable(lacking)}' without its numbers, which could fill the memory"
    return None


def _are_tensors(content: bytes) -> bool:
    """Return whether example inputs are pickled as PyTorch pickles plain tensors, and hold nothing else."""
    example = Archive(io.BytesIO(content), "its example input", WITHOUT_CODE)
    if not all(EXAMPLE.fullmatch(name) for name in example.entries):
        return False
    calls = pickletools.genops(example.read("data.pkl"))
    return all(
        OPCODES.fullmatch(opcode.name) and (opcode.name != "GLOBAL" or argument in CLASSES)
        for opcode, argument, _ in calls
    )


def _without_bytes(archive: Archive, config: dict[str, Any], folder: str) -> str | None:
    """Return the name of a tensor with more numbers than its entry has bytes, such as a view of one number."""
    for name, payload in config["config"].items():
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        if min(sizes, default=0) < 0 or math.prod(sizes) > archive.entries[f"{folder}/{payload['path_name']}"].size:
            return str(name)
    return None


def _suspicious(part: Any) -> Iterator[str]:
    """Name the parts of a graph's description that could run code: everything but calls of torch's operators on sizes
    and tensors.
    """
    if isinstance(part, list):
        for inner in part:
            yield from _suspicious(inner)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key in FORBIDDEN or (key in ("use_pickle", "guards_code", "treespec_namedtuple_fields") and value):
            yield f"'{key}'"
        elif key == "target" and value is not None and not _is_target(value):
            yield f"a call of '{str(value)[:40]}'"
        elif key == "expr_str" and not (isinstance(value, str) and EXPRESSION.fullmatch(value)):
            yield f"the expression '{str(value)[:40]}'"
        elif key in ("in_spec", "out_spec") and not _is_tree(json.loads(value)):
            yield "objects of its own"
        else:
            yield from _suspicious(value)


def _is_target(value: Any) -> bool:
    return isinstance(value, str) and bool(TARGET.fullmatch(value))


def _is_tree(spec: Any) -> bool:
    if isinstance(spec, list):  # [version, root]
        return all(isinstance(part, int) or _is_tree(part) for part in spec)
    return spec["type"] in TREE_TYPES and all(_is_tree(child) for child in spec["children_spec"])
