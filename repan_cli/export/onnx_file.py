"""Write `.onnx` files from a graph, and open them with ONNX Runtime. Needs the `onnx` extra."""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repan_cli.checkpoint.preprocessing import as_texts
from repan_cli.config.conventions import OPSET
from repan_cli.errors import InputError
from repan_cli.export.onnx_digest import HEADER, change_of, serialized
from repan_cli.export.opset import at_opset
from repan_cli.export.trace import output_names, quiet
from repan_cli.models.outputs import all_leaves
from repan_cli.system.files import to_json
from repan_cli.system.packages import ONNX_PACKAGES, need
from repan_cli.system.text import first_line

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
PACKAGES = ONNX_PACKAGES


def write(program: ExportedProgram, header: dict[str, Any], opset: int = OPSET) -> bytes:
    """Return the file of a graph, with a description in its metadata: plain entries for others, `repan` for this
    program.

    Raises InputError for an operator that ONNX does not have in this version.
    """
    return seal(model_of(program, opset), header)


def model_of(program: ExportedProgram, opset: int = OPSET) -> Any:
    """Return the model of a graph, without a description. Raises InputError as `write` does."""
    need("writing ONNX", *PACKAGES)
    names = _checked([name or OUTPUT for name in output_names(program)])
    try:
        with quiet():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=names, verbose=False
            )
    except Exception as error:
        raise InputError(f"cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    assert exported is not None, "the exporter by dynamo returns a program"
    return at_opset(exported.model_proto, opset)


def _checked(names: list[str]) -> list[str]:
    """Return the names of outputs.

    Raises InputError if one equals the input's name, which a graph cannot have twice.
    """
    if INPUT in names:
        raise InputError(f"returns an output called '{INPUT}', the name of the input in ONNX files: rename it")
    return names


def model_for_one_image(network: nn.Module, images: Tensor, opset: int = OPSET) -> Any:
    """Return the model of a network with several outputs, for one image of this size (C, H, W) at a time.

    PyTorch's older exporter writes detectors, whose number of results depends on the image; `torch.export` cannot
    follow that. The exporter records a single pass. The image with the most results is used for it, because a pass that
    finds nothing leaves out the later steps.

    Raises InputError as `write` does, and if nothing is found in any image.
    """
    need("writing ONNX", *PACKAGES)
    import onnx

    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)  # the exporter changes its mode
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            with quiet(), torch.no_grad():
                passes = [(all_leaves(network(image)), image) for image in images.split(1)]
                found, image = max(passes, key=lambda each: sum(value.numel() for value in each[0].values()))
                if not all(value.numel() for value in found.values()):
                    raise ValueError("it finds nothing in the images that it was tried on")
                names = _checked([*found])
                _fix_size(network, image)
                torch.onnx.export(
                    network, (image,), file, dynamo=False, opset_version=OPSET, input_names=[INPUT], output_names=names
                )
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cannot be written as ONNX: {first_line(error)}") from error
        return at_opset(onnx.load(file), opset)


def _fix_size(network: nn.Module, image: Tensor) -> None:
    """Let torchvision's detectors resize an image (1, C, H, W) to the size that they compute for it, as a constant.

    The exporter would write 320 * (1 / 800) for 320 / 800, of which 800 pixels give 319.99997, so 319 pixels.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    def fix(module: nn.Module, inputs: Any, output: Any) -> None:
        ((height, width),) = output[0].image_sizes
        vars(module)["fixed_size"] = (width, height)

    parts = [module for module in network.modules() if isinstance(module, GeneralizedRCNNTransform)]
    hooks = [module.register_forward_hook(fix) for module in parts if module.fixed_size is None]
    if hooks:
        network(image)
    for hook in hooks:
        hook.remove()


def seal(model: Any, header: dict[str, Any]) -> bytes:
    """Return an ONNX model without details of the machine it was made on, with a description and a checksum."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
        for side in value.type.tensor_type.shape.dim:
            if re.fullmatch(r"s\d+", side.dim_param):  # the exporter's name of the only dynamic size
                side.dim_param = BATCH
    described = dict(header)
    texts = as_texts(described.pop("preprocessing"))
    return serialized(model, {**texts, HEADER: to_json(described, sort_keys=True)})


class OnnxNetwork(nn.Module):
    """The network in an `.onnx` file, run by ONNX Runtime on the CPU: (N, C, H, W) to logits (N, classes).

    With `several`, a file with named outputs returns them all by name; otherwise only the first. Files of other
    programs may be in float16 or have a fixed batch size. `threads` defaults to torch's number.
    """

    def __init__(self, content: bytes | Path, threads: int | None = None, *, several: bool = False) -> None:
        super().__init__()
        need("opening ONNX", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        source = content if isinstance(content, bytes) else str(content)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        given = self.session.get_inputs()[0]
        self.input = given.name
        self.dtype = torch.float16 if given.type == "tensor(float16)" else torch.float32
        self.batch = given.shape[0] if given.shape and isinstance(given.shape[0], int) else None
        outputs = [each.name for each in self.session.get_outputs()]
        self.outputs = outputs if several else outputs[:1]
        self.named = several and outputs != [OUTPUT]

    @property
    def one_by_one(self) -> bool:
        """Return whether the network returns several tensors for one image, whose sizes may differ between images."""
        return self.named and self.batch == 1

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        ready = images.detach().cpu().to(self.dtype).contiguous()
        if self.batch is None or len(ready) == self.batch:
            found = self._run(ready)
        else:
            parts = [
                [each[: len(part)] for each in self._run(_filled(part, self.batch))] for part in ready.split(self.batch)
            ]
            found = [torch.cat(same) for same in zip(*parts, strict=True)]
        named = {name: each.to(images.device) for name, each in zip(self.outputs, found, strict=True)}
        return named if self.named else named[self.outputs[0]]

    def _run(self, images: Tensor) -> list[Tensor]:
        try:
            found = self.session.run(self.outputs, {self.input: images.numpy()})
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run the network: {first_line(error)}") from None
        tensors = map(torch.from_numpy, found)
        return [each.float() if each.dtype == torch.float16 else each for each in tensors]


def _filled(images: Tensor, batch: int) -> Tensor:
    """Return a batch of the given size, in which the last image is repeated."""
    return torch.cat([images, images[-1:].expand(batch - len(images), *images.shape[1:])]).contiguous()


LOOPS = ("Loop", "Scan")
"""Operators with which even a small file may compute forever. No exporter writes them for an image classifier."""


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read once and accepted: its bytes, its model, and how another program changed it."""

    path: Path
    content: bytes
    model: Any
    change: str | None

    @property
    def header(self) -> str | None:
        """Return the description that repan wrote into it."""
        found: str | None = {entry.key: entry.value for entry in self.model.metadata_props}.get(HEADER)
        return found

    def network(self) -> OnnxNetwork:
        """Return its network.

        ONNX Runtime gets the bytes that were checked. Raises InputError if it cannot open them.
        """
        need("opening ONNX", "onnx", "onnxruntime")
        renamed = self.change is not None and len(self.model.graph.output) == 1  # the only output is the logits
        try:
            return OnnxNetwork(self.content, several=self.header is not None and not renamed)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.path} cannot be opened by ONNX Runtime: {first_line(error)}") from None


def read(path: Path) -> OnnxFile:
    """Read a file without running it.

    Raises InputError if the file is damaged, is not ONNX, reads other files, or may never end.
    """
    need("opening ONNX", "onnx")
    import onnx

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise InputError(f"{path} is damaged, or not an ONNX file: {first_line(error)}") from None
    _refuse_unfit(path, model)
    return OnnxFile(path, content, model, change_of(path, content, model))


def _refuse_unfit(path: Path, model: Any) -> None:
    """Raise InputError for a model that reads other files, or may never end."""
    from onnx import TensorProto

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
                for sparse in (given.sparse_tensor, *given.sparse_tensors):
                    stored += [sparse.values, sparse.indices]
        if any(tensor.data_location == TensorProto.EXTERNAL for tensor in stored):
            raise InputError(f"{path} reads weights from other files: refused; save it as one file")


def header(path: Path) -> str | None:
    """Return the description that repan wrote into a file. Raises InputError as `read` does."""
    return read(path).header


def graph(path: Path) -> Any:
    """Return the model of a file, parsed and not run. Raises InputError as `read` does."""
    return read(path).model


def open_file(path: Path) -> OnnxNetwork:
    """Return the network in a file. Raises InputError as `read` does, or if ONNX Runtime cannot open it."""
    return read(path).network()
