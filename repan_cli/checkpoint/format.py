"""Define checkpoints: tensors and plain types only, written atomically, verified by a digest, never unpickled.

A checkpoint is weights by name, and a `ModelCard` that is enough to rebuild the network. A `.pt` file is a dictionary
that `torch.load(weights_only=True)` reads. A `.safetensors` file has the description in its header.

Both carry two SHA-256: one over names, dtypes, shapes, bytes and description, and one over the file itself. A file is
refused if either does not match.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from repan_cli.checkpoint.card import FUSED, Change, ModelCard
from repan_cli.checkpoint.preprocessing import as_texts, preprocessing
from repan_cli.checkpoint.published import for_others
from repan_cli.system.files import to_json, write_atomically

FORMAT = 1

CONTENT = {"version": int, "digest": str, "meta": dict, "weights": dict, "state": dict}

CHECKSUM, DIGITS = b"repan sha256 ", 64
"""The mark in front of the SHA-256 of all other bytes of a file, and the number of its digits. Both are the comment at
the end of a `.pt` or `.pt2` archive, the last metadata entry of an `.onnx` file, and the first value in the header of a
`.safetensors` file.
"""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, on the CPU, and the description of their network.

    `state` holds, by name, the other tensors from which a run resumes; only in its `last.pt`.
    """

    weights: dict[str, Tensor]
    card: ModelCard
    state: dict[str, Tensor] = field(default_factory=dict)

    def digest(self) -> str:
        """Return the SHA-256 over the tensors (name, dtype, shape, logical bytes) and the description."""
        return digest_of(self.weights, self.card.as_meta(), self.state)


def digest_of(
    weights: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None, state: Mapping[str, Tensor] | None = None
) -> str:
    """Return the SHA-256 over tensors (name, dtype, shape, logical bytes) and a description in plain types."""
    return _digest(weights, to_json(meta or {}, sort_keys=True), state or {})


def has_digest(
    digest: str, weights: Mapping[str, Tensor], meta: Mapping[str, Any], state: Mapping[str, Tensor]
) -> bool:
    """Return whether a file's content has this digest, in the present form or in that of version 0.1.

    The two forms differ if a description holds numbers that are not finite, such as the best score of a run without
    validation.
    """
    texts = dict.fromkeys((to_json(meta, sort_keys=True), json.JSONEncoder(sort_keys=True).encode(meta)))
    return any(digest == _digest(weights, text, state) for text in texts)


def _digest(weights: Mapping[str, Tensor], described: str, state: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(described.encode())
    for kind, tensors in (("", weights), ("state ", state)):
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            total.update(f"{kind}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def capture(model: nn.Module, card: ModelCard) -> Checkpoint:
    """Return the checkpoint of a network, with its weights copied to the CPU."""
    return Checkpoint(weights_of(model), card)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a network to the CPU, by name."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def capture_fused(model: nn.Module, origin: Checkpoint, changes: Iterable[Change]) -> Checkpoint:
    """Return the checkpoint of a network that was merged from `origin`, which its description names by digest.

    `changes` are the changes that turn the plain network into the merged one. Merged networks are made to be shared, so
    the names of their author's folders are left out.
    """
    structure = replace(origin.card.structure, changes=tuple(Change(*change) for change in changes))
    card = replace(origin.card, structure=structure, form=FUSED, fused_from=origin.digest(), run=None)
    return capture(model, for_others(card))


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint in the format that the name's ending gives, `.pt` or `.safetensors`."""
    buffer = as_bytes(checkpoint, path.suffix)
    write_atomically(path, lambda file: file.write(buffer))


def as_bytes(checkpoint: Checkpoint, suffix: str) -> bytes:
    """Return the content of the checkpoint's file, in the format `.pt` or `.safetensors`."""
    return _as_safetensors(checkpoint) if suffix == ".safetensors" else _as_pt(checkpoint)


def header(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything in a file except the weights, in plain types."""
    card = checkpoint.card
    described = {"version": FORMAT, "digest": checkpoint.digest(), "meta": card.as_meta()}
    return {
        **described,
        "preprocessing": preprocessing(card),
    }  # the last is derived from the second, for other programs


def _as_pt(checkpoint: Checkpoint) -> bytes:
    buffer = io.BytesIO()
    content = {"format": "repan", **header(checkpoint), "weights": checkpoint.weights, "state": checkpoint.state}
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment
    buffer.write((len(CHECKSUM) + DIGITS).to_bytes(2, "little") + CHECKSUM)
    return sealed(buffer, buffer.tell())


def _as_safetensors(checkpoint: Checkpoint) -> bytes:
    described = {"seal": CHECKSUM.decode() + "0" * DIGITS, **header(checkpoint)}
    texts = as_texts(described.pop("preprocessing"))
    content = _with_metadata(safetensors.torch.save(checkpoint.weights), {"repan": to_json(described), **texts})
    return sealed(io.BytesIO(content), content.index(CHECKSUM) + len(CHECKSUM))


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a `.safetensors` file with its metadata in this order; safetensors itself writes them in random order."""
    length = int.from_bytes(content[:8], "little")
    listed = json.loads(content[8 : 8 + length])
    text = to_json({"__metadata__": dict(metadata), **listed}, compact=True).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def sealed(buffer: io.BytesIO, place: int) -> bytes:
    """Return the file in `buffer` with the digits of its SHA-256 at `place`, after `CHECKSUM`."""
    digits = sum_around(buffer, place)
    buffer.seek(place)
    buffer.write(digits)
    return buffer.getvalue()


def sum_around(file: IO[bytes], place: int) -> bytes:
    """Return the SHA-256, in digits, of all bytes except those digits themselves."""
    total = hashlib.sha256()
    file.seek(0)
    while part := file.read(min(2**20, place - file.tell())):
        total.update(part)
    file.seek(place + DIGITS)
    while part := file.read(2**20):
        total.update(part)
    return total.hexdigest().encode()
