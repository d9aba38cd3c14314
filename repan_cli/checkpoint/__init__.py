"""Checkpoints: tensors and plain types only, written atomically, verified by a digest, never unpickled."""

from repan_cli.checkpoint.card import FUSED, PLAIN, ModelCard
from repan_cli.checkpoint.format import (
    Checkpoint,
    as_bytes,
    capture,
    capture_fused,
    header,
    save,
    sealed,
)
from repan_cli.checkpoint.reading import check_seal, chosen_in, load, load_any, noted_name
from repan_cli.checkpoint.weights import load_weights
from repan_cli.system.weight_files import split_key

__all__ = [
    "FUSED",
    "PLAIN",
    "Checkpoint",
    "ModelCard",
    "as_bytes",
    "capture",
    "capture_fused",
    "check_seal",
    "chosen_in",
    "header",
    "load",
    "load_any",
    "load_weights",
    "noted_name",
    "save",
    "sealed",
    "split_key",
]
