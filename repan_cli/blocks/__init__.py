"""Define re-parameterizable blocks: kernel algebra, branches, the block, its families.

Knows nothing of configuration.
"""

from repan_cli.blocks.branches import Branch, ConvBN, IdentityBN, ScaledIdentity
from repan_cli.blocks.families import FAMILIES, NATIVE, block_around, check_family, make_block, side_branches
from repan_cli.blocks.geometry import Geometry
from repan_cli.blocks.rep_block import (
    RepBlock,
    attach_rates,
    chosen_blocks,
    fill_all,
    known_attached,
    reinit_branches,
    rep_blocks,
    reparameterize,
    set_attach_rate,
)
from repan_cli.blocks.user_block import is_own, register_block, use_block

__all__ = [
    "FAMILIES",
    "NATIVE",
    "Branch",
    "ConvBN",
    "Geometry",
    "IdentityBN",
    "RepBlock",
    "ScaledIdentity",
    "attach_rates",
    "block_around",
    "check_family",
    "chosen_blocks",
    "fill_all",
    "is_own",
    "known_attached",
    "make_block",
    "register_block",
    "reinit_branches",
    "rep_blocks",
    "reparameterize",
    "set_attach_rate",
    "side_branches",
    "use_block",
]
