"""Checkpoints: tensors and plain types only, written atomically, verified by a digest, never unpickled.

A checkpoint is weights by name and a description (`meta`) that is enough to rebuild the network. As `.pt` it is a
dictionary that `torch.load(weights_only=True)` reads, as `.safetensors` the description travels in the header. Both
carry a SHA-256 over names, dtypes, shapes, bytes and description, and one over the file itself, and are refused when
either does not match.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repan_cli.errors import InputError
from repan_cli.runs import RunDirectory, write_atomically

FORMAT = 1
_numpy_scalar = np.float64(0).__reduce__()[0]
PLAIN_TYPES = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What trainers save beside weights and what is no code: attributes, and numbers of numpy's."""

CONTENT = {"version": int, "digest": str, "meta": dict, "weights": dict, "state": dict}
DESCRIBED = {"model": str, "form": str, "classes": (list, tuple), "in_chans": int, "structure": dict, "config": dict}
"""The kinds of what a description may hold, for files that were made up."""

MOST_TEXT = 2**21
"""Bytes of a description, a pickle or a header, enough for 20,000 tensors. One that is longer, and more than an eighth
of its file, is made to fill the memory: as objects it takes seventy times its bytes."""

SEAL, DIGITS = b"repan sha256 ", 64
"""What stands in front of the SHA-256 of all other bytes of a file, and how many digits that has. It is the comment of
a `.pt` or `.pt2` archive, at the end, the last metadata of an `.onnx` file, and the first value in the header of a
`.safetensors` file."""

EXPORTS = {".onnx": "onnxruntime.InferenceSession", ".pt2": "torch.export.load"}
"""Files of networks that are no checkpoints, and what opens them."""

MULTI_BRANCH, FUSED, PLAIN = "multi-branch", "fused", "plain"


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, on the CPU, and a description in plain types.

    `meta` holds at least: model, block, form ("multi-branch", "fused" or "plain"), classes, in_chans, image_size,
    mean, std, data, cycle, epoch, metrics. `state`: what else a run needs to go on, by name; only in its last.pt.
    """

    weights: dict[str, Tensor]
    meta: dict[str, Any]
    state: dict[str, Tensor] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over the tensors (name, dtype, shape, logical bytes) and the description."""
        total = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        for kind, tensors in (("", self.weights), ("state ", self.state)):
            for name in sorted(tensors):
                tensor = tensors[name].detach().cpu().contiguous()
                total.update(f"{kind}{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def capture(model: nn.Module, meta: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a network: its weights copied to the CPU."""
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return Checkpoint(weights, dict(meta))


def capture_fused(model: nn.Module, origin: Checkpoint) -> Checkpoint:
    """The checkpoint of a network that was merged from `origin`, which its description names by digest."""
    changes = [list(change) for change in model.repan_report.changes]
    structure = {**origin.meta["structure"], "changes": changes}
    return capture(model, {**origin.meta, "structure": structure, "form": FUSED, "fused_from": origin.digest()})


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; the name's ending, .pt or .safetensors, is its format."""
    buffer = as_bytes(checkpoint, path.suffix)
    write_atomically(path, lambda file: file.write(buffer))


def as_bytes(checkpoint: Checkpoint, suffix: str) -> bytes:
    """The content of its file, `.pt` or `.safetensors`."""
    return _as_safetensors(checkpoint) if suffix == ".safetensors" else _as_pt(checkpoint)


def header(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a file says of itself beside its weights, in plain types."""
    return {"version": FORMAT, "digest": checkpoint.digest(), "meta": checkpoint.meta}


def save_last(checkpoint: Checkpoint, folder: RunDirectory) -> None:
    """Write a run's newest state, keeping the one before it."""
    buffer = _as_pt(checkpoint)
    folder.replace_last(lambda file: file.write(buffer))


def _as_pt(checkpoint: Checkpoint) -> bytes:
    buffer = io.BytesIO()
    content = {"format": "repan", **header(checkpoint), "weights": checkpoint.weights, "state": checkpoint.state}
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the archive's comment
    buffer.write((len(SEAL) + DIGITS).to_bytes(2, "little") + SEAL)
    return sealed(buffer, buffer.tell())


def _as_safetensors(checkpoint: Checkpoint) -> bytes:
    seal = SEAL.decode() + "0" * DIGITS
    # one entry only: safetensors writes several in random order, and equal content must give equal bytes
    buffer = io.BytesIO(
        safetensors.torch.save(checkpoint.weights, {"repan": json.dumps({"seal": seal, **header(checkpoint)})})
    )
    return sealed(buffer, buffer.getvalue().index(SEAL) + len(SEAL))


def sealed(buffer: io.BytesIO, place: int) -> bytes:
    """The file in `buffer` with the digits of its SHA-256 at their `place`, behind `SEAL`."""
    digits = _sum_around(buffer, place)
    buffer.seek(place)
    buffer.write(digits)
    return buffer.getvalue()


def _sum_around(file: IO[bytes], place: int) -> bytes:
    """The digits of the SHA-256 of all bytes but those where these digits stand."""
    total = hashlib.sha256()
    file.seek(0)
    while part := file.read(min(2**20, place - file.tell())):
        total.update(part)
    file.seek(place + DIGITS)
    while part := file.read(2**20):
        total.update(part)
    return total.hexdigest().encode()


def load(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint, from `.pt` or `.safetensors`.

    Raises InputError, naming the file, when it is missing, damaged, or not written by repan.
    """
    saved = load_any(path)
    if not isinstance(saved, Checkpoint):
        raise InputError(f"{path} was not written by repan")
    return saved


def load_any(path: str | Path) -> Checkpoint | dict[str, Tensor]:
    """A checkpoint of repan's, verified, or the weights by name in a file of others.

    Of others' files, `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors`, the usual wrappers (`state_dict`, `model`, ...)
    are opened. Raises InputError, naming the file, when it is missing, damaged, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint {path}" + (": it is a folder; name a file in it" if path.is_dir() else ""))
    if path.suffix in EXPORTS:
        raise InputError(f"{path} is an export: {EXPORTS[path.suffix]} opens it, and repan evaluate, predict and info")
    try:
        is_sealed = check_seal(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    if not isinstance(content, Mapping) or content.get("format") != "repan":
        return _foreign_weights(content, path)
    checkpoint = _verified(content, path)
    if not is_sealed:  # it was lost, or another program wrote the file again
        raise InputError(f"{path} is damaged: the check sum of the file is missing; use another copy")
    return checkpoint


def check_seal(path: Path) -> bool:
    """Whether a file, of whatever format, carries a check sum. Raises InputError when it is not that of its bytes."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            file.seek(max(0, path.stat().st_size - len(SEAL) - DIGITS))
        start, part = file.tell(), file.read(256)
        if SEAL not in part:
            return False
        place = start + part.index(SEAL) + len(SEAL)
        expected = _sum_around(file, place)
        file.seek(place)
        if file.read(DIGITS) != expected:
            raise InputError(f"{path} is damaged: its bytes do not match its check sum; use another copy")
        return True


def _verified(content: Mapping[str, Any], path: Path) -> Checkpoint:
    version = content.get("version")
    if isinstance(version, int) and version > FORMAT:
        raise InputError(f"{path} was written by a newer repan: upgrade this one")
    if not all(isinstance(content.get(name), kind) for name, kind in CONTENT.items()):
        raise InputError(f"{path} is damaged: parts of it are missing; use another copy")
    checkpoint = Checkpoint(content["weights"], content["meta"], content["state"])
    if not (_are_plain({**checkpoint.weights, **checkpoint.state}, path) and _is_description(checkpoint.meta, path)):
        raise InputError(f"{path} is damaged: it holds what repan does not write; use another copy")
    if checkpoint.digest() != content["digest"]:
        raise InputError(f"{path} is damaged: its content does not match its digest; use another copy")
    return checkpoint


def _are_plain(tensors: Mapping[Any, Any], path: Path) -> bool:
    """Whether all are dense tensors by name; one larger than its file is a view that would fill the memory."""
    return all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type, tensor.is_quantized) == (torch.strided, "cpu", False)
        and tensor.numel() * tensor.element_size() <= path.stat().st_size
        for name, tensor in tensors.items()
    )


def _longest_text(path: Path) -> int:
    return max(MOST_TEXT, path.stat().st_size // 8)


def check_description(meta: Mapping[str, Any]) -> None:
    """Raises ValueError unless everything that a description may hold is of its kind."""
    if wrong := [name for name, kind in DESCRIBED.items() if not isinstance(meta.get(name), kind)]:
        raise ValueError(wrong[0])


def _is_description(meta: Mapping[str, Any], path: Path) -> bool:
    """Whether it is plain, of the right kinds, and short: lists that share parts may be of any length as text."""
    length, longest = 0, _longest_text(path)
    try:
        for part in json.JSONEncoder(sort_keys=True).iterencode(meta):
            length += len(part)
            if length > longest:
                return False
    except (TypeError, ValueError, RecursionError):
        return False
    return all(isinstance(meta[name], kind) for name, kind in DESCRIBED.items() if name in meta)


class _NothingIsCopied(TorchFunctionMode):
    """Refuses what a pickle may do to a small tensor that is seen as a huge one: take it apart, or convert it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.unbind, Tensor.to):  # unbind is how iteration begins
            raise pickle.UnpicklingError("tensors are only read")
        return function(*args, **(kwargs or {}))


def _read_pt(path: Path) -> Any:
    try:
        _refuse_bombs(path)
        with torch.serialization.safe_globals(PLAIN_TYPES), _NothingIsCopied(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is damaged, or holds more than tensors and plain types (a whole pickled network?): refused, no "
            "code is run; save its state_dict() instead"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # the reader of a damaged archive raises nearly anything
        raise InputError(f"{path} is damaged, or no checkpoint at all; use another copy") from None


def _refuse_bombs(path: Path) -> None:
    """Raises InputError for a file that would take far more memory than it has bytes, before torch reads it."""
    bomb = InputError(f"{path} would fill the memory: refused; save its state_dict() with torch.save, uncompressed")
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            file.seek(0)
            pickles = [file] * 5  # torch's old format: number, protocol, system, content, names of storages
        else:
            pickles = _pickles_of_archive(file, bomb)
        for part in pickles:
            _refuse_makers(part, _longest_text(path), bomb)


def _pickles_of_archive(file: IO[bytes], bomb: InputError) -> Iterator[IO[bytes]]:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        # with something in front of it, torch would not find the same directory
        if packed or sum(entry.file_size for entry in entries) > size or min(entry.header_offset for entry in entries):
            raise bomb
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                yield io.BytesIO(archive.read(entry))


def _refuse_makers(file: IO[bytes], longest: int, bomb: InputError) -> None:
    """Raises for a pickle that is long, or makes an array out of its length alone."""
    start = file.tell()
    for _, argument, place in pickletools.genops(file):
        if place - start > longest or argument in ("builtins bytearray", "__builtin__ bytearray"):
            raise bomb


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _longest_text(path):
                raise ValueError("a header this long is none")
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        ours = {"format": "repan", "weights": weights, "state": {}}
        return {**ours, **json.loads(header["repan"])} if "repan" in header else weights
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:
        raise InputError(f"{path} is damaged, or no safetensors file; use another copy") from None


def load_weights(model: nn.Module, checkpoint: Checkpoint, source: str) -> None:
    """Copy a checkpoint's weights into a network, in place and strictly.

    Raises InputError naming the first keys or shapes that differ.
    """
    own = model.state_dict()
    missing, extra = own.keys() - checkpoint.weights.keys(), checkpoint.weights.keys() - own.keys()
    for what, names in (("lacks", missing), ("has, unlike the network,", extra)):
        if names:
            raise InputError(
                f"{source} does not fit the network: it {what} {len(names)} of the weights, such as '{min(names)}'"
            )
    for name, value in own.items():
        if value.shape != checkpoint.weights[name].shape:
            shapes = f"{tuple(checkpoint.weights[name].shape)}, not {tuple(value.shape)}"
            raise InputError(f"{source} does not fit the network: its '{name}' has the shape {shapes}")
    model.load_state_dict(checkpoint.weights)


# ---------------------------------------------------------------------------------------------- others' weights

WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "network", "module", "weights", "params")
"""Under which keys trainers save the weights, in the order in which they are looked for."""

PREFIXES = ("module.", "_orig_mod.")
"""What data-parallel wrappers and torch.compile put in front of names."""


def _foreign_weights(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(16):  # no further: a wrapper may hold itself
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = content.items() if isinstance(content, Mapping) else ()
    weights = {name: value for name, value in tensors if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no weights: no tensors by name, nor under {', '.join(WRAPPERS)}")
    if not _are_plain(weights, path):
        raise InputError(f"{path} holds tensors that are sparse, quantized or larger than the file: save plain ones")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_foreign(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, *, may_be_new: Collection[str] = ()
) -> bool:
    """Copy others' weights into a network, in place; returns whether the classifier had to stay new.

    A prefix that the network does not know (`model.`, `backbone.`) is taken off. The layers named in `may_be_new`,
    those of the classifier, may be missing or have another shape; everything else must fit. Raises InputError naming
    the first keys or shapes that differ.
    """
    own = model.state_dict()
    weights = _renamed(_converted(model, weights), own)
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    weights = {**counters, **weights}  # older files lack them
    new = {
        name
        for name, value in own.items()
        if name.rpartition(".")[0] in may_be_new and (name not in weights or weights[name].shape != value.shape)
    }
    load_weights(model, Checkpoint({**weights, **{name: own[name] for name in new}}, {}), source)
    return bool(new)


def _renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the one leading part of the names taken off that makes most of them known."""
    prefixes = ["", *dict.fromkeys(name.partition(".")[0] + "." for name in weights)]
    best = max(
        prefixes, key=lambda prefix: sum(name.startswith(prefix) and name[len(prefix) :] in own for name in weights)
    )
    return {name.removeprefix(best): value for name, value in weights.items()}


def _converted(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights in an original author's names, through timm's own filter for that network, where it has one."""
    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None or weights.keys() <= model.state_dict().keys():
        return weights
    try:
        converted = convert(dict(weights), model)
    except Exception:  # made for files that this one is not
        return weights
    own = model.state_dict().keys()
    return converted if len(own & converted.keys()) > len(own & weights.keys()) else weights
