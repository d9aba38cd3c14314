"""Suggest the network of another program's weights, from the name that the program noted beside them."""

from __future__ import annotations

from repan_cli import checkpoint
from repan_cli.config import names


def how_to_name(source: str) -> str:
    """Return the advice to give --model for a file that does not name its network, with the name if one is noted.

    timm's trainer notes it as `arch`. It is not taken without asking: a name alone does not tell the library.
    """
    noted = checkpoint.noted_name(source)
    base = (noted or "").partition(".")[0]
    if base in names.of_timm():
        return f"give --model {names.TIMM}{noted} (the file says '{noted}')"
    if base in names.of_torchvision():
        return f"give --model {names.TORCHVISION}{noted} (the file says '{noted}')"
    return "give --model NAME"
