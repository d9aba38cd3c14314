"""Read files of weights, written by repan or others: verified, never unpickled, bounded in memory."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repan_cli.checkpoint.archive import Archive
from repan_cli.checkpoint.card import ModelCard
from repan_cli.checkpoint.contents import are_plain, foreign_weights
from repan_cli.checkpoint.format import CHECKSUM, CONTENT, DIGITS, FORMAT, Checkpoint, has_digest, sum_around
from repan_cli.errors import InputError
from repan_cli.system.text import quoted
from repan_cli.system.weight_files import file_in, no_checkpoint, refuse_other_kinds, split_key

_numpy_scalar = np.float64(0).__reduce__()[0]
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "bool")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Harmless objects that trainers save next to weights: attribute containers and numpy scalars."""

MOST_TEXT = 2**21
"""The largest description, pickle or header in bytes, enough for 20,000 tensors; a larger one may take up to an eighth
of its file. Anything beyond that is made to fill the memory: as objects it takes seventy times its bytes.
"""

STORAGE = re.compile(r"data/\d+")
RECORDS = re.compile(
    rf"{STORAGE.pattern}|data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
"""The entries of an archive that torch.save wrote, and those of them that hold tensors."""

SAVE_AGAIN = "save its state_dict() alone with torch.save"

OF_LIBRARIES = re.compile(
    r"torch\.nn\.modules\.\w+\.[A-Z]\w*|torch\.nn\.parallel\.\w+\.[A-Z]\w*|torch\.optim\.\w+\.[A-Z]\w*"
    r"|torch\.nn\.functional\.\w+|torch\._utils\._rebuild_\w+|(timm\.(models|layers)|torchvision\.(models|ops))(\.\w+)+"
    r"|numpy\.(ndarray|dtype)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|collections\.\w+"
    r"|(builtins|__builtin__)\.(set|frozenset|slice|range|complex|bytearray|object|int|float|list|dict|tuple|str)"
    r"|_?copyreg\._reconstructor|copy_reg\._reconstructor|argparse\.Namespace|pathlib\.\w*Path|datetime\.\w+"
)
"""Harmless names in the pickles of whole networks. A message advises opening a file only if it has no other names."""

EXPORTS = {".onnx": "onnxruntime.InferenceSession", ".pt2": "torch.export.load"}
"""Files of networks that are not checkpoints, and the commands that open them."""


def chosen_in(path: str | Path) -> Path:
    """Return the file that a path means: for a run's folder its best weights, else its last ones.

    Raises InputError for a folder that has neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    for name in ("best.pt", "last.pt"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{path} is a folder without best.pt or last.pt: name a file in it")


def load(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint, from `.pt` or `.safetensors`.

    Raises InputError, naming the file, when it is missing, damaged, or not written by repan.
    """
    saved = load_any(path)
    if not isinstance(saved, Checkpoint):
        raise InputError(
            f"{path} was not written by repan: 'repan fuse {quoted(path)} --model NAME' writes its network in a form "
            "that opens here"
        )
    return saved


def load_any(source: str | Path) -> Checkpoint | dict[str, Tensor]:
    """Load a checkpoint of repan, verified, or the weights by name from another program's file.

    Other programs' files may be `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors`, with the weights inside any of the
    wrappers that trainers use. `FILE::KEY` chooses one of several networks in a file. A run's folder stands for its
    best weights.

    Raises InputError, naming the file, when it is missing, damaged, or holds no weights.
    """
    path, key = split_key(source)
    path = file_in(path) if path.is_dir() else path
    if not path.is_file():
        raise InputError(no_checkpoint(path))
    if path.suffix in EXPORTS:
        raise InputError(f"{path} is an export: {EXPORTS[path.suffix]} opens it, and repan evaluate, predict and info")
    try:
        is_sealed = check_seal(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    if not isinstance(content, Mapping) or content.get("format") != "repan":
        return foreign_weights(content, path, key)
    checkpoint = _verified(content, path)
    if not is_sealed:  # the checksum was lost, or another program saved the file again
        raise InputError(f"{path} is damaged: the checksum of the file is missing; use another copy")
    return checkpoint


NOTED = ("arch", "architecture", "model_name")
"""The keys under which other programs note the name of a network beside its weights."""


def noted_name(source: str | Path) -> str | None:
    """Return the name of the network that another program noted in its file, or None."""
    path, _ = split_key(source)
    path = file_in(path) if path.is_dir() else path
    content = None if path.suffix == ".safetensors" else _read_pt(path)
    noted = [content.get(key) for key in NOTED] if isinstance(content, Mapping) else []
    return next((name for name in noted if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,80}", name)), None)


def check_seal(path: Path) -> bool:
    """Return whether a file of any format carries a checksum. Raises InputError if it does not match the bytes."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            file.seek(max(0, path.stat().st_size - len(CHECKSUM) - DIGITS))
        start, part = file.tell(), file.read(256)
        if CHECKSUM not in part:
            return False
        place = start + part.index(CHECKSUM) + len(CHECKSUM)
        expected = sum_around(file, place)
        file.seek(place)
        if file.read(DIGITS) != expected:
            raise InputError(f"{path} is damaged: its bytes do not match its checksum; use another copy")
        return True


def _verified(content: Mapping[str, Any], path: Path) -> Checkpoint:
    version = content.get("version")
    if isinstance(version, int) and version > FORMAT:
        raise InputError(f"{path} was written by a newer repan: upgrade this one")
    if not all(isinstance(content.get(name), kind) for name, kind in CONTENT.items()):
        raise InputError(f"{path} is damaged: parts of it are missing; use another copy")
    weights, meta, state = (content[name] for name in ("weights", "meta", "state"))
    if not (are_plain([*weights.items(), *state.items()], path) and _is_short(meta, path)):
        raise InputError(f"{path} is damaged: it holds data that repan never writes; use another copy")
    if not has_digest(content["digest"], weights, meta, state):
        raise InputError(f"{path} is damaged: its content does not match its digest; use another copy")
    return Checkpoint(weights, card_of(meta, path), state)


def card_of(meta: Mapping[str, Any], path: Path) -> ModelCard:
    """Read the description in a file. Raises InputError, naming the file, for anything that repan does not write."""
    try:
        return ModelCard.from_meta(meta)
    except ValueError as error:
        raise InputError(f"{path} describes its network with {error}: it is damaged, or from another version") from None


def _longest_text(path: Path) -> int:
    return max(MOST_TEXT, path.stat().st_size // 8)


def _is_short(meta: Mapping[str, Any], path: Path) -> bool:
    """Return whether a description is plain and short; nested lists that share parts could expand to any length as
    text.
    """
    length, longest = 0, _longest_text(path)
    try:
        for part in json.JSONEncoder(sort_keys=True).iterencode(meta):
            length += len(part)
            if length > longest:
                return False
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class _NothingIsCopied(TorchFunctionMode):
    """Refuse the operations by which a pickle could make a small tensor pretend to be a huge one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.unbind, Tensor.to):  # iteration begins with unbind
            raise pickle.UnpicklingError("tensors are only read")
        return function(*args, **(kwargs or {}))


def _read_pt(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            source = _checked(file, path)
            with torch.serialization.safe_globals(PLAIN_TYPES), _NothingIsCopied(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' pickle protocols
                try:
                    return torch.load(source, map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    raise InputError(_of_code(path, str(error), source)) from None
    except InputError:
        refuse_other_kinds(path)
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # the reader of a damaged archive raises nearly anything
        refuse_other_kinds(path)
        raise InputError(f"{path} is damaged, or not a checkpoint; use another copy") from None


def _of_code(path: Path, why: str, source: IO[bytes]) -> str:
    """Describe what an unpickler of plain types refused: an object of some class, code to run, or damage."""
    name = re.search(r"(?:GLOBAL|global) ([A-Za-z_][\w.]*\.\w+)", why)
    if name is None:
        return f"{path} is damaged, or holds more than tensors and plain types: refused, no code is run; {SAVE_AGAIN}"
    names = _globals_of(source)
    if code := [each for each in (*names, name[1]) if not OF_LIBRARIES.fullmatch(each)]:
        return f"{path} would run {code[0]} when it is opened: refused, no code is run; {SAVE_AGAIN}"
    whole = f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pt')"
    mend = f"if you trust it, save its weights: {whole}" if names else SAVE_AGAIN
    return (
        f"{path} is damaged, or holds an object of {name[1]}, such as a whole pickled network: refused, no code is "
        f"run; {mend}"
    )


def _globals_of(source: IO[bytes]) -> list[str]:
    """Return the names in a file that stand for code, except those that torch allows.

    The list is empty if the file cannot be parsed.
    """
    try:
        source.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # a file in torch's old format, or damage
        return []


def _checked(file: IO[bytes], path: Path) -> IO[bytes]:
    """Return the bytes that torch may read: those that were checked, because another reader may see the file
    differently.

    Raises InputError for a file that would take far more memory than it has bytes.
    """
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        whole = io.BytesIO(file.read())
        for _ in range(5):  # torch's old format: number, protocol, system, content, names of storages
            _refuse_makers(whole, path)
        whole.seek(0)
        return whole
    archive = Archive(file, path, SAVE_AGAIN)
    archive.refuse_unless(RECORDS, "a checkpoint")
    if small := [
        name
        for name, entry in archive.entries.items()
        if not STORAGE.fullmatch(name) and entry.size > _longest_text(path)
    ]:
        size = archive.entries[small[0]].size / 2**20
        raise InputError(
            f"{path} holds {size:.1f} MiB besides its tensors, in '{small[0]}', such as a long history of losses: "
            f"refused, because it may fill the memory when unpacked; {SAVE_AGAIN}"
        )
    _refuse_makers(io.BytesIO(archive.read("data.pkl")), path)
    return archive.rewritten(STORAGE)


def _refuse_makers(file: IO[bytes], path: Path) -> None:
    """Raise InputError for a pickle that is too long, or that builds an array from its length alone."""
    start, longest = file.tell(), _longest_text(path)
    for _, argument, place in pickletools.genops(file):
        if (place or 0) - start > longest or argument in ("builtins bytearray", "__builtin__ bytearray"):
            raise InputError(f"{path} would fill the memory: refused; {SAVE_AGAIN}")


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
        refuse_other_kinds(path)
        raise InputError(f"{path} is damaged, or not a safetensors file; use another copy") from None
