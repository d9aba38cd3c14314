"""TorchScript: for programs in C++, Java and others that link libtorch. The file holds code."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import Conversion, Kind, cannot
from repan_cli.export.trace import quiet
from repan_cli.system.text import first_line

FILE = "model.torchscript"
OF_PYTHON = ".debug_pkl"
"""Entries that tell of the Python code a program came from, paths included; nothing needs them."""


class Images(nn.Module):
    """A network whose input is called `images`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def convert(conversion: Conversion) -> dict[str, bytes]:
    """Trace a network for batches of any size, without what the file would tell of this machine."""
    network = Images(copy.deepcopy(conversion.network).eval().requires_grad_(False))
    buffer = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(network, conversion.images[:2].contiguous(), check_trace=False)
            torch.jit.save(torch.jit.freeze(traced.eval()), buffer)
    except Exception as error:
        raise cannot("TorchScript", conversion, error) from error
    return {FILE: _without_paths(buffer.getvalue())}


def _without_paths(content: bytes) -> bytes:
    """Return the archive without entries about Python; the rest is stored unchanged, without a date."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith((OF_PYTHON, "serialization_id")):
                new.writestr(zipfile.ZipInfo(f"model/{entry.filename.partition('/')[2]}"), old.read(entry))
    return result.getvalue()


class TorchScriptNetwork(nn.Module):
    """The program in a file: (N, C, H, W) to logits (N, classes). It runs whatever code the file holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            with quiet():
                self._program = [torch.jit.load(str(path), map_location="cpu")]  # in a list: not a part of this module
        except Exception as error:
            raise InputError(f"{path} cannot be opened by PyTorch: {first_line(error)}") from None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self._program[0](images.cpu().contiguous())
        return found.to(images.device)


KIND = Kind(
    "TorchScript",
    (FILE,),
    convert,
    lambda folder: TorchScriptNetwork(folder / FILE),
    'torch.jit.load("{folder}/model.torchscript")(images)',
)
