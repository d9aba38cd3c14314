"""Check that ranks agree before they train together: code, settings, images, network, position.

A difference would go unnoticed later, since gradients are averaged whatever they belong to. Everything is compared by
digests, at the start of a run and when it is resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import repan_cli
from repan_cli.checkpoint.format import digest_of, weights_of
from repan_cli.config.settings import Config, flatten
from repan_cli.data.image_files import ArrayReader
from repan_cli.data.types import ArrayImages, Dataset, Part, digest_of_names
from repan_cli.system.ranks import agree, joined, of_first_rank
from repan_cli.system.text import count
from repan_cli.training.progress import POSITION
from repan_cli.training.run import Training
from repan_cli.training.snapshot import SUMS, snapshot

MAY_DIFFER = (
    *("data.root", "data.class_order", "data.workers", "run.out", "run.trackers", "model.name", "model.init"),
    *("teacher.name", "baseline.teacher.name"),
)
"""Settings that may differ between machines because they are locations. The contents are compared instead."""

DIGITS = 12
"""The number of digits of a digest that are shown."""


def agree_on_settings(config: Config) -> None:
    """Raise InputError if ranks have different settings, or different versions of repan and PyTorch."""
    if joined():
        versions = {"repan": f"{repan_cli.__version__} ({_code()})", "PyTorch": str(torch.__version__)}
        agree(versions, "install the same on all machines")
        settings = {f"setting {key}": str(value) for key, value in flatten(config).items() if key not in MAY_DIFFER}
        agree(settings, "give all the same command and the same file of settings")


def agree_on_images(dataset: Dataset) -> None:
    """Raise InputError if ranks have read different images, labels or classes."""
    if joined():
        facts = {"the classes": _short(repr(dataset.classes).encode()), "the validation part": dataset.split_digest}
        for name, part in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test)):
            if part is not None:
                facts |= {f"the {name} {what}": fact for what, fact in _facts(part).items()}
        agree(facts, "give all machines the same data (data.root)")


def agree_on_network(model: nn.Module, name: str) -> None:
    """Raise InputError if ranks begin with different weights."""
    if joined():
        facts = {"the weights of the network": f"{Path(name).name} ({digest_of(weights_of(model))[:DIGITS]})"}
        agree(facts, "give all machines the same files (model.name, model.init) and the same software")


def agree_on_position(training: Training) -> None:
    """Raise InputError if ranks would resume from different positions, or with different teachers."""
    if joined():
        tensors, _ = snapshot(training)
        memory = {name: value for name, value in tensors.items() if name not in (*SUMS, "totals.noted")}
        facts = {f"the progress ({name})": str(getattr(training.progress, name)) for name in POSITION}
        facts["the state of the optimizer"] = digest_of(memory)[:DIGITS]
        facts["the teacher"] = ", ".join(digest[:DIGITS] for digest in training.task_of.digests.values())
        agree(facts, "give all machines the same run and the same teacher")


@contextlib.contextmanager
def file_of_first_rank(path: Path, rank: int) -> Iterator[Path]:
    """Give every rank the file that the first rank has at `path`; the others may not see that folder."""
    if not joined():
        yield path
        return
    content = of_first_rank(None if rank else path.read_bytes())
    if not rank:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="repan-") as folder:
        received = Path(folder, path.name)
        received.write_bytes(content)
        yield received


def _facts(part: Part) -> dict[str, str]:
    facts = {"images": count(len(part.labels), "image"), "labels": _short(part.labels.tobytes())}
    if isinstance(part, ArrayImages):
        return {**facts, "pixels": _short(part.images)}
    if isinstance(part.read, ArrayReader):
        return {**facts, "pixels": _short(part.read.images)}
    names = digest_of_names(part)
    return facts if names is None else {**facts, "names of images": names[:DIGITS]}


def _short(content: Any) -> str:
    """Return the beginning of the SHA-256 of bytes or of an array."""
    if not isinstance(content, bytes):
        content = memoryview(content if content.flags.c_contiguous else content.copy()).cast("B")
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _code() -> str:
    """Return the beginning of a digest of the package's own files."""
    root = Path(repan_cli.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:DIGITS]
