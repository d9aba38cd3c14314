"""`.pt2` files: a graph as torch.export saves it, and nothing that could run code.

torch's own reader unpickles, evaluates expressions and calls whatever a file names. Here files are written without
pickles, and one that holds more than tensors and calls of torch's operators is refused before that reader sees it.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repan_cli import checkpoint
from repan_cli.checkpoint.format import CHECKSUM, DIGITS
from repan_cli.errors import InputError
from repan_cli.export.trace import quiet

HEADER = "repan.json"
RECORDS = re.compile(
    r"[^/]+/(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|"
    r"model_constants_config\.json)|data/sample_inputs/model\.pt|extra/repan\.json|archive_format|archive_version|"
    r"\.data/version|\.data/serialization_id|byteorder|\.format_version|version)"
)
"""All that an archive may hold."""

TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save|load|_?print|warn)\w+\.\w+|_operator\.(add|sub|mul|floordiv|truediv|mod|eq|ge|le|gt|lt)"
)
"""The calls that a graph may make: PyTorch's operators on tensors, save those on files, and arithmetic of sizes."""

EXPRESSION = re.compile(r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=True)*\)|[su]?\d+|[-+*/() ])+")
TREE_TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", None}
FORBIDDEN = {"as_operator", "as_custom_obj", "as_graph", "as_string_to_argument", "hoo_call_outputs"}


def write(program: ExportedProgram, header: dict[str, Any]) -> bytes:
    """The file of a graph, with a description beside it, without pickles."""
    program._example_inputs = None  # which would be pickled
    program._guards_code = []  # which the reader would execute
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={HEADER: json.dumps(header, sort_keys=True)})
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment
    buffer.write((len(CHECKSUM) + DIGITS).to_bytes(2, "little") + CHECKSUM)
    return checkpoint.sealed(buffer, buffer.tell())


class Pt2Network(nn.Module):
    """The network in a `.pt2` file: (N, C, H, W) to logits (N, classes)."""

    def __init__(self, content: bytes | Path) -> None:
        super().__init__()
        check(content)
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        with quiet():
            program = torch.export.load(source)
        self._run = [program.module()]  # in a list: an exported module refuses eval() and train()

    def to(self, *args: Any, **kwargs: Any) -> Pt2Network:
        """Move to another device; a graph keeps its memory format."""
        device = kwargs.get("device", *args[:1])
        if device is not None:
            self._run[0].to(device)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self._run[0](images.contiguous())


def open_file(path: Path) -> Pt2Network:
    """The network in a file. Raises InputError when it is damaged, no such file, or holds code."""
    try:
        return Pt2Network(path)
    except InputError:
        raise
    except Exception:
        raise InputError(f"{path} is damaged, or no file of torch.export's; use another copy") from None


def header(path: Path) -> str | None:
    """The description that repan wrote into the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{HEADER}")]
            return archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, OSError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------- no code


def check(content: bytes | Path) -> None:
    """Raise InputError for an archive that holds more than tensors and calls of torch's operators, or is packed."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    name = "the file" if isinstance(content, bytes) else content
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with zipfile.ZipFile(source) as archive:
            reason = _reason_to_refuse(archive, size)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError, OSError):
        raise InputError(f"{name} is damaged, or no file of torch.export's; use another copy") from None
    if reason:
        raise InputError(
            f"{name} holds {reason}: refused, no code is run; repan fuse --format pt2 writes files without"
        )


def _reason_to_refuse(archive: zipfile.ZipFile, size: int) -> str | None:
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
        return "packed parts that would fill the memory"
    if len({entry.filename for entry in entries}) < len(entries):
        return "two parts of one name"
    for entry in entries:
        if not RECORDS.fullmatch(entry.filename):
            return f"a part that is no graph, {entry.filename}"
        if entry.filename.endswith("sample_inputs/model.pt") and entry.file_size:
            return "pickled example inputs"
        if entry.filename.endswith(".json") and not entry.filename.endswith(HEADER):
            found = json.loads(archive.read(entry))
            if reason := next(_suspicious(found), None):
                return reason
    return None


def _suspicious(part: Any) -> Iterator[str]:
    """Name what in a graph's description could run code: all but calls of torch's operators on sizes and tensors."""
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
