"""Checkpoints: tensors and plain types only, written atomically, verified by a digest, never unpickled."""

from repan_cli.checkpoint.format import (
    FUSED,
    PLAIN,
    Checkpoint,
    as_bytes,
    capture,
    capture_fused,
    check_description,
    header,
    save,
    sealed,
)
from repan_cli.checkpoint.reading import check_seal, load, load_any
from repan_cli.checkpoint.weights import load_foreign, load_weights

__all__ = [
    "FUSED",
    "PLAIN",
    "Checkpoint",
    "as_bytes",
    "capture",
    "capture_fused",
    "check_description",
    "check_seal",
    "header",
    "load",
    "load_any",
    "load_foreign",
    "load_weights",
    "save",
    "sealed",
]
