"""Handle user-defined block families in checkpoints: those that a file needs, and the one that the user gives."""

from __future__ import annotations

import dataclasses

from repan_cli.blocks import FAMILIES, is_own, use_block
from repan_cli.checkpoint.card import FUSED, ModelCard
from repan_cli.errors import InputError
from repan_cli.system.user_code import names_a_file


def needed(card: ModelCard) -> list[str]:
    """Return the user-defined families that a network is built with; a merged network has no branches."""
    if card.form == FUSED:
        return []
    named = [change.family for change in card.structure.changes] + [card.structure.native.get("block")]
    return [name for name in dict.fromkeys(named) if name is not None and is_own(name)]


def missing(card: ModelCard) -> list[str]:
    """Return the families that are not registered in this process."""
    return [name for name in needed(card) if name not in FAMILIES]


def given_again(card: ModelCard, block: str | None, source: str) -> ModelCard:
    """Return the description of a network, with its block family replaced by the one that the user gave.

    Files named in a checkpoint are never imported. Raises InputError, naming the file that is needed, if a family is
    neither registered nor given, or if one is given and none is needed.
    """
    own = needed(card)
    if block is None or not is_own(block):
        if lacking := missing(card):
            raise InputError(how_to_give(lacking[0], source, card.model))
        return card
    if not own:
        if card.form == FUSED:  # whose branches are gone
            return card
        raise InputError(f"{source} holds blocks of the family {card.block}: --block {block} is for blocks of your own")
    name = use_block(block)
    replaced = own if len(own) == 1 else missing(card)
    if len(replaced) > 1:
        many = " and ".join(replaced)
        raise InputError(f"{source} holds blocks of several families of your own: repan_cli.register_block {many}")
    return renamed(card, {old: name or old for old in replaced})


def how_to_give(name: str, source: str, network: str | None = None) -> str:
    """Return the error for a file whose block family was not given.

    `network` is the network in the file. If it is a user's own, it must be given again too, and the message names both.
    """
    how = f"--block {name}" if names_a_file(name) else "--block FILE.py:FUNCTION, or repan_cli.register_block"
    what = f"blocks of your own, {name}"
    if network is not None and names_a_file(network):
        what, how = f"a network and blocks of your own, {network} and {name}", f"--model {network} {how}"
    return f"{source} holds {what}: give {how} (files are not imported automatically)"


def renamed(card: ModelCard, names: dict[str, str]) -> ModelCard:
    """Return a description with other names for some families."""
    structure = card.structure
    changes = tuple(
        change._replace(family=names.get(change.family or "", change.family)) for change in structure.changes
    )
    native = {**structure.native}
    if native.get("block") in names:
        native["block"] = names[native["block"]]
    structure = dataclasses.replace(structure, changes=changes, native=native)
    return dataclasses.replace(card, block=names.get(card.block or "", card.block), structure=structure)
