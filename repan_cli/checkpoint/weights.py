"""Copy weights into a network, in place and strictly."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

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


def load_foreign(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, *, may_be_new: Collection[str] = ()
) -> bool:
    """Copy others' weights into a network, in place; returns whether the classifier had to stay new.

    A prefix that the network does not know (`model.`, `backbone.`) is taken off. The layers named in `may_be_new`,
    those of the classifier, may be missing or have another shape; everything else must fit. Raises InputError naming
    the first keys or shapes that differ.
    """
    own = model.state_dict()
    weights = _renamed(_converted(model, weights), own)
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    weights = {**counters, **weights}  # older files lack them
    new = {
        name
        for name, value in own.items()
        if name.rpartition(".")[0] in may_be_new and (name not in weights or weights[name].shape != value.shape)
    }
    load_weights(model, {**weights, **{name: own[name] for name in new}}, source)
    return bool(new)


def _renamed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the leading part of the names that makes most of them known."""
    prefixes = ["", *dict.fromkeys(name.partition(".")[0] + "." for name in weights)]
    best = max(
        prefixes, key=lambda prefix: sum(name.startswith(prefix) and name[len(prefix) :] in own for name in weights)
    )
    return {name.removeprefix(best): value for name, value in weights.items()}


def _converted(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights in an original author's names, through timm's own filter for that network, where it has one."""
    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None or weights.keys() <= model.state_dict().keys():
        return weights
    try:
        converted = convert(dict(weights), model)
    except Exception:  # made for files that this one is not
        return weights
    own = model.state_dict().keys()
    return converted if len(own & converted.keys()) > len(own & weights.keys()) else weights
