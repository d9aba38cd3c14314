"""A fuzzer for each reader of files: genuine ones are changed at random, and each is read or refused in a line.

What else happens is a finding: another exception, more than `MOST_SECONDS` of CPU, or the end of the process, which
leaves its last file as `case` in the folder for temporary files. Found files are kept under `tests/corpus/READER`, and
read by the fast tests from then on. By hand:

    python tests/fuzzing.py READER SECONDS [SEED]
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from support import card_of

from repan_cli import checkpoint, models
from repan_cli.checkpoint.card import ModelCard
from repan_cli.checkpoint.format import CHECKSUM, DIGITS, FORMAT, Checkpoint, digest_of, sealed
from repan_cli.config import files
from repan_cli.data import image_files
from repan_cli.errors import InputError
from repan_cli.export import onnx_file, pt2_file
from repan_cli.session.artifact import written_in

CORPUS = Path(__file__).with_name("corpus")
MOST_SECONDS = 20

Draw = random.Random
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


# ---------------------------------------------------------------------------------------------- changes


def mutated(draw: Draw, content: bytes, others: list[bytes]) -> bytes:
    """Change bytes: one to four changes of bits, numbers, pieces."""
    whole = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size = len(whole)
        place, other = draw.randrange(size + 1), draw.randrange(size + 1)
        start, end = sorted((place, min(other, place + 64)) if draw.random() < 0.8 else (place, other))
        match draw.randrange(8):
            case 0 if place < size:
                whole[place] ^= 1 << draw.randrange(8)
            case 1 if place < size:
                whole[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2:
                width = draw.choice((1, 2, 4, 8))
                number = draw.choice(INTERESTING) % 2 ** (8 * width)
                whole[place : place + width] = number.to_bytes(width, draw.choice(("little", "big")))
            case 3:
                del whole[start:end]
            case 4:
                whole[place:place] = whole[start:end] * draw.choice((1, 2, 50))
            case 5:
                piece = draw.choice(others)
                cut = draw.randrange(len(piece) + 1)
                whole[start:end] = piece[cut : cut + draw.choice((4, 32, 500))]
            case 6:
                del whole[place:]
            case _:
                whole[place:place] = draw.randbytes(draw.choice((1, 2, 8, 64)))
    return bytes(whole)


ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    1.5,
    float("nan"),
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    "a" * 5000,
    [],
    [[]],
    {},
    {"": 0},
]
NAMES = ["timm:resnet18", "timm:vit_giant_patch14_224", "repvgg_b3_cifar", "torchvision:vgg16", "net.py:build", "head"]


def odd(draw: Draw, value: object, depth: int = 0) -> object:
    """Change one part of plain types."""
    if isinstance(value, dict) and value and (depth == 0 or draw.random() < 0.7):
        name = draw.choice(list(value))
        match draw.randrange(6):
            case 0:
                return {key: part for key, part in value.items() if key != name}
            case 1:
                return {**value, draw.choice(["", "model", "evil", "\x00", 1]): value[name]}
            case _:
                return {**value, name: odd(draw, value[name], depth + 1)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        longer = draw.choice((1, 1, 1, 1000))
        return [*value[:place], *[odd(draw, value[place], depth + 1)] * longer, *value[place + draw.randrange(2) :]]
    return draw.choice([*ODD, *NAMES])


# ---------------------------------------------------------------------------------------------- readers


class Reader(NamedTuple):
    """A reader: the ending of its files, genuine ones, how one is changed, and how it is read."""

    ending: str
    genuine: Callable[[], list[bytes]]
    change: Callable[[Draw, list[bytes]], bytes]
    read: Callable[[Path], object]


def _saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(4, 3), "b": torch.arange(3), "c": torch.ones((), dtype=torch.float16)}


def _card() -> ModelCard:
    return card_of(torch.nn.Identity(), "repvgg_a0_cifar", config={"data.name": "digits"})


def _anyhow(draw: Draw, seeds: list[bytes]) -> bytes:
    return mutated(draw, draw.choice(seeds), seeds)


def _inside(draw: Draw, seeds: list[bytes]) -> bytes:
    """Change an entry of an archive, which is then whole again; or any bytes."""
    whole = draw.choice(seeds)
    if draw.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(whole)):
        return mutated(draw, whole, seeds)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    long = [name for name, content in entries.items() if content and "data/0" not in name]
    chosen = draw.choice(long)
    entries[chosen] = mutated(draw, entries[chosen], list(entries.values()))
    if draw.random() < 0.1:
        entries.pop(draw.choice(list(entries)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _described(draw: Draw, seeds: list[bytes]) -> bytes:
    """A file whose sums are right and whose description is odd."""
    meta = json.loads(json.dumps(_card().as_meta()))
    for _ in range(draw.choice((1, 1, 2))):
        meta = odd(draw, meta)
    weights = _weights()
    content = {"format": "repan", "version": FORMAT, "meta": meta, "weights": weights, "state": {}}
    try:
        content["digest"] = digest_of(weights, meta)
    except (TypeError, ValueError):
        content["digest"] = ""
    if draw.random() < 0.1:
        content = odd(draw, content)
    buffer = io.BytesIO(_saved(content))
    buffer.seek(-2, 2)
    buffer.write((len(CHECKSUM) + DIGITS).to_bytes(2, "little") + CHECKSUM)
    return sealed(buffer, buffer.tell())


def _with_header(draw: Draw, seeds: list[bytes]) -> bytes:
    """Change the header of a safetensors file, whose length is then right again; or any bytes."""
    whole = draw.choice(seeds)
    if draw.random() < 0.4:
        return mutated(draw, whole, seeds)
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    if draw.random() < 0.5:
        header = json.dumps(odd(draw, json.loads(header))).encode()
    else:
        header = mutated(draw, header, [header])
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


def _weights_in(path: Path) -> None:
    found = checkpoint.load_any(path)
    if isinstance(found, Checkpoint):
        models.rebuild(found, str(path))


def _graph_in(path: Path) -> None:
    written_in(pt2_file.header(path))
    pt2_file.open_file(path)


def _onnx_in(path: Path) -> None:
    onnx_file.graph(path)
    written_in(onnx_file.header(path))


def _image_in(path: Path) -> None:
    image_files.check(path, whole=True)
    image_files.square(image_files.open_image(path), 8)


def _pt_files() -> list[bytes]:
    own = checkpoint.as_bytes(Checkpoint(_weights(), _card()), ".pt")
    return [_saved(_weights()), _saved({"state_dict": _weights(), "epoch": 3}), _old(), own]


def _old() -> bytes:
    return _saved({"model": _weights()}, _use_new_zipfile_serialization=False)


def _safetensors_files() -> list[bytes]:
    own = checkpoint.as_bytes(Checkpoint(_weights(), _card()), ".safetensors")
    return [safetensors.torch.save(_weights()), safetensors.torch.save(_weights(), {"repan": "{}"}), own]


def _pt2_files() -> list[bytes]:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    program = torch.export.export(model, (torch.ones(2, 3, 8, 8),))
    header = checkpoint.header(Checkpoint(_weights(), _card()))
    whole = pt2_file.write(program, header)
    return [whole[: whole.rindex(CHECKSUM) - 2] + b"\0\0"]  # without the sum, which every change would break


def _onnx_files() -> list[bytes]:
    from test_hostile_onnx import POOL, endless, hidden_in_a_constant, model

    header = checkpoint.header(Checkpoint(_weights(), _card()))
    return [onnx_file.seal(built, header) for built in (model([POOL]), endless(), hidden_in_a_constant())]


def _images() -> list[bytes]:
    draw = np.random.default_rng(0)
    colours = Image.fromarray(draw.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")]
    found = []
    for kind, mode in [*kinds, ("BMP", "RGB"), ("PPM", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"), ("GIF", "P")]:
        buffer = io.BytesIO()
        colours.convert(mode).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def _presets() -> list[bytes]:
    return [
        b"optim:\n  lr: 0.1\nepochs: 3\nblock:\n  include: [a, 'b*']\nbase: recipes/cifar\n",
        b"a: &x 1\nb: *x\n? c\n: d\n",
    ]


READERS = {
    "pt": Reader(".pt", _pt_files, _inside, _weights_in),
    "card": Reader(".pt", _pt_files, _described, _weights_in),
    "safetensors": Reader(".safetensors", _safetensors_files, _with_header, _weights_in),
    "pt2": Reader(".pt2", _pt2_files, _inside, _graph_in),
    "onnx": Reader(".onnx", _onnx_files, _anyhow, _onnx_in),
    "yaml": Reader(".yaml", _presets, _anyhow, files.read_file),
    "image": Reader(".png", _images, _anyhow, _image_in),
}


# ---------------------------------------------------------------------------------------------- the fuzzer


def outcome(reader: Reader, path: Path) -> str | None:
    """Read a file; returns what must not happen, in a line, or None."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
    except InputError as error:
        if not str(error):
            return "an error that says nothing"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(last.filename).name}:{last.lineno})"
    seconds = time.process_time() - began
    return f"{seconds:.0f} s of CPU" if seconds > MOST_SECONDS else None


class Tally(NamedTuple):
    executions: int
    findings: dict[str, bytes]


def fuzz(name: str, *, seconds: float, seed: int = 0, most: int | None = None) -> Tally:
    """Change and read files for some time, or `most` times. Returns how many, and a file for each kind of finding."""
    reader, draw = READERS[name], random.Random(seed)
    seeds = reader.genuine()
    findings: dict[str, bytes] = {}
    ends, count = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"case{reader.ending}"
        while time.monotonic() < ends and (most is None or count < most):
            content = reader.change(draw, seeds)
            path.write_bytes(content)
            if (found := outcome(reader, path)) is not None:
                kind = found.partition(" (")[2] or found
                if kind not in findings:
                    print(f"{name} {count}: {found}", flush=True)
                    findings[kind] = content
            count += 1
    return Tally(count, findings)


def keep(name: str, content: bytes) -> Path:
    """Keep a found file in the corpus."""
    path = CORPUS / name / f"{hashlib.sha256(content).hexdigest()[:12]}{READERS[name].ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    chosen, length, *more = sys.argv[1:]
    tally = fuzz(chosen, seconds=float(length), seed=int(more[0]) if more else 0)
    for case in tally.findings.values():
        print(keep(chosen, case))
    print(f"{chosen}: {tally.executions:,} executions, {len(tally.findings)} kinds of findings", flush=True)
