"""Find the weights in files that other trainers wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.notices import warn

NO_WEIGHTS = re.compile(r"optim|sched|scaler|amp|hyper|callback|loops", re.IGNORECASE)
"""Keys of a file that hold tensors but no network."""

AVERAGE = re.compile(r"(^|[^a-z])(ema|swa|avg|averaged?|shadow)([^a-z]|$)", re.IGNORECASE)
"""The names under which trainers keep the running average of their weights."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of names that data-parallel wrappers and torch.compile add."""

DEEPEST = 5
"""The number of nested levels in which weights are searched; a wrapper may contain itself."""

COUNTERS = ("num_batches_tracked", "n_averaged")


class _Network(NamedTuple):
    """Tensors by name, and the path of keys in the file that leads to them, joined by dots."""

    key: str
    weights: dict[str, Tensor]

    @property
    def size(self) -> int:
        return sum(not name.endswith(COUNTERS) for name in self.weights)

    @property
    def is_average(self) -> bool:
        return bool(AVERAGE.search(self.key))


# ---------------------------------------------------------------------------------------------- where weights are


def foreign_weights(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """Return the weights, by name, from the content of another program's file.

    If there are several networks of one size, the running average is taken, as timm does, and a message says so. `key`
    chooses another network, by the keys of the file or by the prefix of its names. Raises InputError if there is none.
    """
    found = [*_networks(content, "", 0)]
    if not found:
        raise InputError(f"{path} holds no weights: no tensors by name, nor under a key such as state_dict or model")
    chosen = _by_key(found, path, key) if key else _preferred(found, path)
    if not are_plain(chosen.items(), path, times=TIED):
        raise InputError(f"{path} holds tensors that are sparse, quantized or larger than the file: save plain ones")
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in chosen)), None):
        chosen = {name.removeprefix(prefix): value for name, value in chosen.items()}
    return chosen


def _networks(content: Any, key: str, depth: int) -> Iterator[_Network]:
    """Yield the tensors by name under every key of a file, outer keys first."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if weights:
        yield _Network(key, weights)
    for name, inner in content.items():
        if isinstance(name, str) and isinstance(inner, Mapping) and not NO_WEIGHTS.search(name):
            yield from _networks(inner, f"{key}.{name}" if key else name, depth + 1)


def _preferred(found: list[_Network], path: Path) -> dict[str, Tensor]:
    largest = max(network.size for network in found)
    whole = [network for network in found if network.size == largest]
    chosen = next((network for network in whole if network.is_average), whole[0])
    found = [network for network in found if 2 * network.size > largest]
    if len(found) > 1:
        others = ", ".join(f"'{network.key}'" for network in found if network is not chosen)
        other = next(network.key for network in found if network is not chosen)
        warn(
            f"{path} holds several networks: using '{chosen.key}'{', the average' * chosen.is_average}, not "
            f"{others}; {path}::{other} selects another"
        )
    return chosen.weights


def _by_key(found: list[_Network], path: Path, key: str) -> dict[str, Tensor]:
    for network in found:
        if network.key == key:
            return network.weights
    start = key.rstrip(".") + "."
    for network in found:
        outer = f"{network.key}." if start.startswith(f"{network.key}.") else ""
        prefix = start.removeprefix(outer)
        if inner := {n.removeprefix(prefix): value for n, value in network.weights.items() if n.startswith(prefix)}:
            return inner
    known = [each for network in found for each in (network.key, *_fronts(network.weights)) if each]
    there = ", ".join(dict.fromkeys(known))
    hint = did_you_mean(key, known) or f": it has {there[:200]}"
    raise InputError(f"{path} holds nothing under '{key}'{hint}")


def _fronts(weights: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in weights))


def are_plain(tensors: Iterable[tuple[Any, Any]], path: Path, *, times: int = 1) -> bool:
    """Return whether all values are dense tensors by name, in total at most `times` the size of the file.

    A tensor larger than its file is a view that would fill the memory when copied. So are many views of one storage.
    """
    largest = path.stat().st_size
    total = 0
    for name, tensor in tensors:
        plain = isinstance(name, str) and isinstance(tensor, Tensor)
        if not plain or (tensor.layout, tensor.device.type, tensor.is_quantized) != (torch.strided, "cpu", False):
            return False
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > largest or total > times * largest or (not size and max(tensor.shape) > largest):
            return False
    return True


TIED = 4
"""The limit on the bytes of all tensors, as a multiple of a foreign file's size. Layers may share tensors."""
