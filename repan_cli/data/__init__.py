"""Data sets and how their images reach the network; importing this registers those that are known by name."""

from repan_cli.data import builtin

__all__ = ["builtin"]
