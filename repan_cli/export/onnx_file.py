"""`.onnx` files: written from a graph, opened by ONNX Runtime. Needs the `onnx` extra."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repan_cli import checkpoint
from repan_cli.checkpoint.card import ModelCard
from repan_cli.checkpoint.format import CHECKSUM, DIGITS
from repan_cli.errors import InputError
from repan_cli.export.trace import quiet
from repan_cli.system.files import to_json
from repan_cli.system.packages import ONNX_PACKAGES, need
from repan_cli.system.text import first_line

OPSET = 18
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
PACKAGES = ONNX_PACKAGES


def write(program: ExportedProgram, header: dict[str, Any]) -> bytes:
    """The file of a graph, with a description in its metadata: `classes` for everybody, `repan` for this program.

    Raises InputError for an operator that ONNX does not have.
    """
    need("writing ONNX", "onnx", *PACKAGES)
    try:
        with quiet():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except Exception as error:
        raise InputError(f"cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    assert exported is not None, "the exporter by dynamo returns a program"
    return seal(exported.model_proto, header)


def seal(model: Any, header: dict[str, Any]) -> bytes:
    """A model of ONNX's, without what it says of the machine it was made on, with a description and a check sum."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
        for side in value.type.tensor_type.shape.dim:
            if re.fullmatch(r"s\d+", side.dim_param):  # the exporter's name of the only size that is free
                side.dim_param = BATCH
    entries = {
        "classes": to_json(ModelCard.from_meta(header["meta"]).classes),
        "repan": to_json(header, sort_keys=True),
        "seal": CHECKSUM.decode() + "0" * DIGITS,  # the last bytes of the file
    }
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString(deterministic=True)
    return checkpoint.sealed(io.BytesIO(content), len(content) - DIGITS)


class OnnxNetwork(nn.Module):
    """The network in an `.onnx` file, run by ONNX Runtime: (N, C, H, W) to logits (N, classes), on the CPU.

    `threads` as torch's where it is not given.
    """

    def __init__(self, content: bytes | Path, threads: int | None = None) -> None:
        super().__init__()
        need("opening ONNX", "onnx", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        source = content if isinstance(content, bytes) else str(content)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        try:
            found = self.session.run(None, {self.input: images.detach().cpu().float().contiguous().numpy()})
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run the network: {first_line(error)}") from None
        return torch.from_numpy(found[0]).to(images.device)


LOOPS = ("Loop", "Scan")
"""Operators by which a file of some bytes may compute for ever; no exporter writes them for an image classifier."""


def header(path: Path) -> str | None:
    """The description that repan wrote into a file."""
    return next((entry.value for entry in graph(path).metadata_props if entry.key == "repan"), None)


def graph(path: Path) -> Any:
    """The model of a file, parsed and not run. Raises InputError for one that reads other files, or may never end."""
    need("opening ONNX", "onnx", "onnx")
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InputError(f"{path} is damaged, or no ONNX file: {first_line(error)}") from None
    pending = [model.graph, *model.functions]
    while pending:
        part = pending.pop()
        stored = [*getattr(part, "initializer", ())]
        for sparse in getattr(part, "sparse_initializer", ()):
            stored += [sparse.values, sparse.indices]
        for node in part.node:
            if node.op_type in LOOPS:
                raise InputError(f"{path} holds the operator {node.op_type}, which may never end: refused")
            for given in node.attribute:
                pending += [*([given.g] if given.HasField("g") else ()), *given.graphs]
                stored += [*([given.t] if given.HasField("t") else ()), *given.tensors]
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored):
            raise InputError(f"{path} reads weights from other files: refused; save it as one file")
    return model


def open_file(path: Path) -> OnnxNetwork:
    """The network in a file. Raises InputError when it is damaged or no ONNX file, and as `graph` does."""
    need("opening ONNX", "onnx", "onnx", "onnxruntime")
    graph(path)
    try:
        return OnnxNetwork(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be opened by ONNX Runtime: {first_line(error)}") from None
