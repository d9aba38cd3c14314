"""Read data sets and bring their images to the network. Importing this package registers the built-in data sets."""

from repan_cli.data import builtin, timm_sets

__all__ = ["builtin", "timm_sets"]
