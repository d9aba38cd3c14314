"""Tell what a user's name for a network means: a file, a run directory, a folder of the Hub, a name.

Without PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from repan_cli.config import names
from repan_cli.config.conventions import ARTIFACT_ENDINGS, GRAPH_ENDINGS
from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.user_code import names_a_file
from repan_cli.system.weight_files import RUNTIME_DESCRIPTION, file_in, may_be_weights, refuse_text, split_key


def file_of(source: str) -> Path | None:
    """Return the file that a user means; None if it is the name of a network."""
    path = Path(source)
    if path.is_dir():
        return file_in(path)
    if path.is_file():
        description = path.parent / RUNTIME_DESCRIPTION  # the description of another program's files
        return description if path.name.startswith("model.") and description.is_file() else path
    if path.exists():
        raise InputError(f"{path} is not a regular file: name a file of weights, or a run's folder")
    if path.suffix in ARTIFACT_ENDINGS or (len(path.parts) > 1 and not names_a_file(source)):
        beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"no file {source}{did_you_mean(str(path), beside)}")
    return None


def check(source: str, model: str | None = None) -> Path | None:
    """Return the file that a source means, or None for a name. Raises InputError if it cannot be a network."""
    if model is not None:
        names.check_model(model)
    if names.names_a_repository(source):
        return None
    path = file_of(str(split_key(source)[0]))
    if path is None:
        names.check_model(source)
    elif path.suffix not in GRAPH_ENDINGS and path.name != RUNTIME_DESCRIPTION and not may_be_weights(path):
        refuse_text(path)
    return path
