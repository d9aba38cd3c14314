"""Find the file of weights that a user means, and recognize other kinds of files, without PyTorch."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.notices import warn_once
from repan_cli.system.text import quoted

DOWNLOAD = "download the file itself"

KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the weights: run 'git lfs pull' where it was cloned"),
    (rb"\s*<(!doctype|html|head|\?xml|!--)", f"is a web page, not the weights: {DOWNLOAD}, not the page about it"),
    (rb"\s*\{", f"is JSON text, an index or an answer of a server, not the weights: {DOWNLOAD}"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!", "is a compressed archive: unpack it, and give the file in it"),
    (rb"\x93NUMPY", "is an array of NumPy's, not weights by name: save a state_dict() with torch.save"),
    (rb"\x89HDF", "is an HDF5 file, as Keras writes it, and not PyTorch's: save a state_dict() with torch.save"),
    (
        rb"GGUF",
        "is a GGUF file, as llama.cpp reads it, and not PyTorch's: use the .safetensors file of the same network",
    ),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8|BM....\0{4}|RIFF....WEBP",
        "is an image: repan predict NETWORK IMAGE",
    ),
    (rb"%PDF", f"is a PDF document, not the weights: {DOWNLOAD}"),
    (rb"....TFL3", "is a TensorFlow Lite file, and not PyTorch's: use the weights it was made from"),
)
"""The first bytes of files that are often taken for weights, with their kind and what to do."""

LOOKED_AT = 4096
"""The number of bytes at the start of a file that show its kind."""

SETTINGS = (".yaml", ".yml")


NEVER_WEIGHTS = (".py", ".txt", ".md", ".csv", ".json", ".jsonl", ".log", ".png", ".jpg", ".jpeg", ".html", *SETTINGS)
"""Endings of files that are never suggested for a misspelled file of weights."""

OF_A_RUN = ("best.pt", "last.pt")
"""The files of a run that stand for it, the first of them first."""

RUNTIME_DESCRIPTION = "repan.json"
"""The file that describes a folder of another program's files, and stands for it."""

HUB_CONFIG = "config.json"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth")
"""The names of description and weights in a folder of the Hub, the preferred ones first."""


def split_key(source: str | Path) -> tuple[Path, str | None]:
    """Return the file that `FILE` or `FILE::KEY` means, and the key."""
    front, colons, key = str(source).rpartition("::")
    if not colons or Path(source).is_file():
        return Path(source), None
    return Path(front), key


def in_hub_folder(folder: Path) -> Path | None:
    """Return the file of weights in a folder of the Hub."""
    found = [folder / name for name in HUB_WEIGHTS if (folder / name).is_file()]
    return found[0] if found and (folder / HUB_CONFIG).is_file() else None


def file_in(folder: Path) -> Path:
    """Return the file that stands for a run's folder or one of the Hub. Raises InputError for any other folder."""
    for name in OF_A_RUN:
        if (folder / name).is_file():
            if name != OF_A_RUN[0]:
                _warn_of_last(folder, name)
            return folder / name
    if (weights := in_hub_folder(folder)) is not None:
        return weights
    if (folder / RUNTIME_DESCRIPTION).is_file():
        return folder / RUNTIME_DESCRIPTION
    found = [best.parent for way in ("*", "*/*") for name in OF_A_RUN for best in sorted(folder.glob(f"{way}/{name}"))]
    inside = [str(run) for run in sorted(found, key=lambda run: run.name.startswith("control_"))]
    mend = f": the runs are in it, such as {quoted(inside[0])}" if inside else ": name a file in it"
    raise InputError(f"{folder} is a folder without best.pt or last.pt{mend}")


def with_an_ending(name: str) -> str:
    """Return the end of an error message for `plain`, if there is a file such as plain.onnx."""
    files = [path for path in sorted(Path(name).parent.glob(f"{glob.escape(Path(name).name)}.*")) if path.is_file()]
    found = [path for path in files if path.suffix not in NEVER_WEIGHTS]
    return f"; did you mean {' or '.join(map(str, found))}?" if found and name else ""


def _warn_of_last(folder: Path, name: str) -> None:
    """Warn that a run's last weights are used, because its best ones are lost or not chosen yet."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return
    with metrics.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(4096)
    if not first:
        warn_once(f"{folder} has no best.pt yet, because no epoch has ended: using {name}, its last weights")
    elif '"val_top1": null' not in first:  # a run with a validation part to choose by
        warn_once(f"{folder} has lost its best.pt: using {name}, its last weights, not the best ones")


def no_checkpoint(path: Path) -> str:
    """Return the message for a missing file of weights, with similar names nearby."""
    near = [*path.parent.iterdir()] if path.parent.is_dir() else []
    beside = [str(other) for other in near if other.suffix.lower() not in NEVER_WEIGHTS]
    if path.exists():
        return f"{path} is not a regular file: name a file of weights, or a run's folder"
    return f"no checkpoint {path}{did_you_mean(str(path), beside)}"


def refuse_text(path: Path) -> None:
    """Raise InputError, naming the kind of a file, if its first bytes are not those of weights."""
    with path.open("rb") as file:
        start = file.read(LOOKED_AT)
    if not start:
        raise InputError(f"{path} is empty, as after a failed download or on a full disk: use another copy")
    for pattern, what in KINDS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            raise InputError(f"{path} {what}")
    if path.suffix in SETTINGS and _is_text(start):
        raise InputError(f"{path} holds settings, not a network: give it to a training command, as -c {quoted(path)}")
    if _is_text(start):
        raise InputError(f"{path} is text, not a network: give a file of weights, or a run's folder")


def _is_text(start: bytes) -> bool:
    try:
        text = start[:-3].decode("utf-8") if len(start) == LOOKED_AT else start.decode("utf-8")
    except UnicodeDecodeError as error:
        text = "" if error.start < len(start) - 3 else start[: error.start].decode("utf-8")
    return bool(text) and all(sign.isprintable() or sign in "\n\r\t\f\ufeff" for sign in text)


def may_be_weights(path: Path) -> bool:
    """Return whether a file begins like weights: an archive, a pickle, or the header of a safetensors file."""
    with path.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    return start.startswith((b"PK", b"\x80")) or (start[8:] == b"{" and 8 + header <= path.stat().st_size)


def refuse_other_kinds(path: Path) -> None:
    """Raise InputError, naming the kind of a file, if it begins or ends like another kind."""
    refuse_text(path)
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 2**16))
        end = file.read()
    if not start.startswith(b"PK\3\4"):
        return
    if b"PK\1\2" not in end and b"PK\5\6" not in end:
        raise InputError(
            f"{path} does not end with an archive's end record: it is cut off, such as half a download; fetch it again"
        )
    if b"/constants.pkl" in end or b"/code/" in end:
        raise InputError(
            f"{path} is a TorchScript program, which holds code: refused; save its weights: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')"
        )
    if b"PK\1\2" in end and b"data.pkl" not in end and b".data/" not in end:
        raise InputError(f"{path} is a zip archive, but not one of torch.save's: unpack it, and give the file in it")
