"""Handle the folder of a format: its description `repan.json`, and the check of every file before a program
reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repan_cli.errors import InputError
from repan_cli.export.runtimes.kinds import Kind
from repan_cli.system.files import to_json
from repan_cli.system.weight_files import RUNTIME_DESCRIPTION

LONGEST = 2**24
"""The largest description in bytes."""


def contents(name: str, files: Mapping[str, bytes], header: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder with their description; `header` is the description of the network."""
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in sorted(files.items())}
    told = {"runtime": name, "files": sums, **header}
    return {**files, RUNTIME_DESCRIPTION: (to_json(told, indent=1, sort_keys=True) + "\n").encode()}


def opened(description: Path, kinds: Mapping[str, Kind]) -> tuple[str, str]:
    """Return the format of a folder, and the text of its description, after a check of each of its files.

    Raises InputError if a file is missing, was changed, or does not belong into such a folder.
    """
    try:
        if description.stat().st_size > LONGEST:
            raise ValueError("too long")
        text = description.read_text(encoding="utf-8")
        told = json.loads(text)
        name, sums = told["runtime"], dict(told["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{description} is damaged, or was not written by repan fuse; use another copy") from None
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"{description} has a format that this version of repan does not know: upgrade repan")
    folder = description.parent
    if not sums or not sums.keys() <= set(kind.files):
        raise InputError(f"{description} names files that {kind.title} does not have: refused")
    for file, wanted in sums.items():
        path = folder / file
        if not path.is_file():
            raise InputError(f"{folder} lacks {file}: copy the whole folder")
        if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise InputError(f"{path} is damaged: its bytes do not match {description.name}; use another copy")
    return name, text
