"""Copy weights into a network, in place and strictly."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from repan_cli.errors import InputError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network, in place and strictly.

    Raises InputError naming the first keys or shapes that differ.
    """
    own = model.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    for what, names in (("lacks", missing), ("has, unlike the network,", extra)):
        if names:
            raise InputError(
                f"{source} does not fit the network: it {what} {len(names)} of the weights, such as '{min(names)}'"
            )
    for name, value in own.items():
        if value.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(value.shape)}"
            raise InputError(f"{source} does not fit the network: its '{name}' has the shape {shapes}")
        if value.is_floating_point() and not weights[name].is_floating_point():  # complex, or packed integers
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise InputError(f"{source} does not fit the network: its '{name}' holds {kind}, not real numbers")
    model.load_state_dict(weights)
