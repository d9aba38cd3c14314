"""Export of a multi-branch network: merge and prove (`fuse`), the weights of the plain network (`conv_bn`), files for
other runtimes (`onnx_file`, `pt2_file`), int8 (`int8`)."""

from repan_cli.export.fuse import (
    PROOF_IMAGES,
    FuseReport,
    count_macs,
    count_parameters,
    fuse,
)
from repan_cli.export.proof import TOLERANCE
from repan_cli.models.outputs import relative_error

__all__ = [
    "PROOF_IMAGES",
    "TOLERANCE",
    "FuseReport",
    "count_macs",
    "count_parameters",
    "fuse",
    "relative_error",
]
