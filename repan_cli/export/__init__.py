"""Export a multi-branch network.

`fuse` merges and proves, `conv_bn` gives the weights of the plain network, `onnx_file` and `pt2_file` write files for
other runtimes, `int8` quantizes.
"""

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
