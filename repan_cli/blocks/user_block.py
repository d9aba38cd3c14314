"""Register user-defined block families: functions that return branches, registered by name or given as
`file.py:function`.

A family is checked when it is registered, see `block_check`. A file is imported only if the user names it
(`use_block`), never because a checkpoint does.
"""

from __future__ import annotations

from repan_cli.blocks.block_check import check
from repan_cli.blocks.families import FAMILIES, NATIVE, SHIPPED, BranchesOf, Family
from repan_cli.errors import InputError
from repan_cli.system.user_code import function_of, names_a_file

UNNAMED = "a block family of a user's own"


def is_own(name: str | None) -> bool:
    """Return whether a name belongs to a user-defined block family, registered or not."""
    return name is not None and name != NATIVE and name not in SHIPPED


def register_block(name: str, build: BranchesOf) -> None:
    """Register a block family of your own, so that its name works wherever a family is named.

    The same name may be registered again, for example in a notebook. Existing networks keep their branches.

    Args:
        name: the name of the family. The names of built-in families are taken.
        build: a function of the `Geometry` of a block's trunk that returns a list of fresh side branches; see
            `blocks.branches.Branch`. It may raise ValueError, with the reason, for a geometry that it does not support.

    Raises InputError if the branches do not merge exactly for every geometry, or if they lack a method that training
    needs.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"register_block needs a name for the family, got {name!r}")
    if not is_own(name):
        raise InputError(f"the block family {name} is part of repan: choose another name")
    if not callable(build):
        raise InputError(f"register_block('{name}', ...) needs a function of a geometry, got {type(build).__name__}")
    check(name, build)
    FAMILIES.put(name, Family(build, " ".join((build.__doc__ or UNNAMED).split())))


def use_block(name: str | None) -> str | None:
    """Return the name of the family that a user gave; a name of the form `file.py:function` is imported and registered.

    Raises InputError, in one line, if the file has no such function, or if the branches do not merge exactly.
    """
    if name is not None and names_a_file(name):
        register_block(name, function_of(name, what="a block family"))
    return name
