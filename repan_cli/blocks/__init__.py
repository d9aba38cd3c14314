"""Re-parameterizable blocks: kernel algebra, branches, the block, its families. Knows nothing of configuration."""

from repan_cli.blocks.branch import Branch, ConvBN, Geometry, IdentityBN
from repan_cli.blocks.families import FAMILIES, make_block
from repan_cli.blocks.rep_block import RepBlock, rep_blocks, reparameterize, set_attach_rate

__all__ = [
    "FAMILIES",
    "Branch",
    "ConvBN",
    "Geometry",
    "IdentityBN",
    "RepBlock",
    "make_block",
    "rep_blocks",
    "reparameterize",
    "set_attach_rate",
]
