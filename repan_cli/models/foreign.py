"""Fit another program's weights to a network: find their place in the file, and translate their names.

Nothing is known about how a trainer wraps its networks. Every prefix of the names in the file may lead to the network,
and every known translation may apply. The combination with the most matching names and shapes is used.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from repan_cli.checkpoint import load_weights
from repan_cli.checkpoint.contents import AVERAGE
from repan_cli.errors import InputError
from repan_cli.models.author_names import FAMILIES, form_in, renamed
from repan_cli.models.inspect import classifier_layers
from repan_cli.models.merged_weights import MergedNames
from repan_cli.system.notices import warn
from repan_cli.system.text import count

Weights = Mapping[str, Tensor]
Naming = Callable[[dict[str, Tensor]], Weights]

COUNTER = "num_batches_tracked"
DEEPEST = 5
"""The number of levels of names that may precede those of the network."""

CLASSIFIERS = ("fc", "head", "classifier", "linear", "cls", "logits")
"""The last part of the names of classifiers that trainers put next to a backbone."""


@dataclass(frozen=True)
class Fitted:
    """Weights under the names of a network.

    `prefix` preceded these names in the file. `outside` are the names in the file that belong to no such network.
    `rivals` are the prefixes of other networks in the file that fit equally well.
    """

    weights: dict[str, Tensor]
    prefix: str
    outside: tuple[str, ...]
    rivals: tuple[str, ...]


def fit(model: nn.Module, weights: Weights) -> Fitted:
    """Find the weights of a network, by its names, among all tensors of a file.

    Its classifier may be in another place of the file. If several networks in the file fit equally, a weight average is
    preferred, then the first one.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTER)}
    merged = MergedNames(model)
    best, found, chosen, scores = 0.0, dict(weights), "", dict[str, float]()
    for prefix, under in _parts(weights, len(own)):
        scores[prefix], named = max(_scored(under, own, model, merged), key=lambda pair: pair[0])
        is_average = bool(AVERAGE.search(prefix)) and not AVERAGE.search(chosen)
        if scores[prefix] > best or (scores[prefix] == best > 0 and is_average):
            best, found, chosen = scores[prefix], named, prefix
    rivals = [each for each, score in scores.items() if score == best > 0 and not _nested(each, chosen)]
    inside, outside = _divided(model, found)
    strangers = {name: weights[name] for name in weights if not name.startswith(chosen)}
    beside = _classifier_beside(inside, {**_not_in(own, inside), **outside, **strangers}, own, classifier_layers(model))
    inside = {name: value for name, value in inside.items() if id(value) not in set(map(id, beside.values()))} | beside
    taken = set(map(id, beside.values()))
    left = [*strangers.items(), *((chosen + name, value) for name, value in outside.items())]
    return Fitted(inside, chosen, tuple(name for name, value in left if id(value) not in taken), tuple(rivals))


def load_foreign(model: nn.Module, weights: Weights, source: str, *, may_be_new: Collection[str] = ()) -> bool:
    """Copy another program's weights into a network, in place; return whether the classifier had to stay new.

    Tensors outside of the network are skipped and named. The layers named in `may_be_new`, those of the classifier, may
    be missing or have another shape. Everything else must fit.

    Raises InputError, with the first keys or shapes that differ, and the form and family of the file if its names show
    them.
    """
    own = model.state_dict()
    fitted = fit(model, weights)
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    found = {**counters, **fitted.weights}  # older files lack them, or use other names
    found = {name: value for name, value in found.items() if name in own or not name.endswith(COUNTER)}
    new = {
        name
        for name, value in own.items()
        if name.rpartition(".")[0] in may_be_new and (name not in found or found[name].shape != value.shape)
    }
    try:
        load_weights(model, {**found, **{name: own[name] for name in new}}, source)
    except InputError as error:
        form = form_in(weights)
        raise InputError(f"{error}; the file is {form}" if form else str(error)) from None
    _tell(fitted, source)
    return bool(new)


def _tell(fitted: Fitted, source: str) -> None:
    """Report the parts of a file that were not used."""
    if fitted.rivals:
        others = ", ".join(f"'{name.rstrip('.')}'" for name in fitted.rivals)
        warn(
            f"{source} holds several such networks: using '{fitted.prefix.rstrip('.')}', not {others}; "
            f"{source}::{fitted.rivals[0].rstrip('.')} selects another"
        )
    left = [name for name in fitted.outside if not name.startswith(fitted.rivals)]
    if left:
        named = ", ".join(dict.fromkeys(name.partition(".")[0] for name in left))
        warn(f"skipped {count(len(left), 'tensor')} of {source} that are not part of the network: {named[:100]}")


def _nested(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _parts(weights: Weights, wanted: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the prefixes that many names share, the shortest first, with the tensors under each."""
    counted: Counter[str] = Counter({"": len(weights)})
    for name in weights:
        levels = name.split(".")[:-1][:DEEPEST]
        counted.update(".".join(levels[:end]) + "." for end in range(1, len(levels) + 1))
    least = max(1, min(wanted, len(weights)) // 10)
    for prefix in sorted((each for each, number in counted.items() if number >= least), key=lambda p: p.count(".")):
        yield prefix, {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _scored(
    weights: dict[str, Tensor], own: Weights, model: nn.Module, merged: MergedNames
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Yield the weights under every translation, with the number of names that match the network's.

    A tensor of another shape counts as half. Translations with equal results are examined once.
    """
    seen: list[dict[str, int]] = []
    for naming in (dict, *_namings(model)):
        try:
            given = naming(weights)
        except Exception:
            continue
        named = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        tensors = {name: id(value) for name, value in named.items()}
        if tensors in seen:
            continue
        seen.append(tensors)
        if merged.are_in(named):
            named = merged.unmerged(named)
        common = own.keys() & named.keys()
        yield sum(1.0 if named[name].shape == own[name].shape else 0.5 for name in common), named


def _namings(model: nn.Module) -> Iterator[Naming]:
    """Yield timm's own filters for a network, and the translations of authors' names."""
    module = sys.modules.get(type(model).__module__)
    for name, function in vars(module).items() if module else ():
        if name.endswith("filter_fn") or name.startswith("_filter"):
            yield partial(_through, function, model)
    for family in FAMILIES:
        yield partial(lambda family, weights: family(weights, model), family)


def _through(convert: Callable[..., Any], model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as one of timm's filters gives them."""
    known = inspect.signature(convert).parameters
    found = convert(dict(weights), model) if len(known) > 1 else convert(dict(weights))
    return {renamed(name): value for name, value in found.items()}


def _divided(model: nn.Module, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide weights into those that belong to the network, whether they fit or not, and those of other things next to
    it.

    Anything whose name begins with none of the network's parts is another thing; so are buffers that the network does
    not save.
    """
    tops = {name.partition(".")[0] for name in model.state_dict()}
    unsaved = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    outside = {n: value for n, value in found.items() if n.partition(".")[0] not in tops or n in unsaved}
    return {name: value for name, value in found.items() if name not in outside}, outside


def _not_in(own: Weights, weights: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in own}


def _classifier_beside(
    inside: Weights, weights: Weights, own: Weights, classifier: Collection[str]
) -> dict[str, Tensor]:
    """Return the weights of the classifier, if the network's weights lack it and exactly one layer of the file may be
    it.
    """
    beside: dict[str, Tensor] = {}
    for layer in classifier:
        wanted = own.get(f"{layer}.weight")
        if wanted is None or f"{layer}.weight" in inside:
            continue
        names = {layer.rpartition(".")[2], *CLASSIFIERS}
        fitting = [
            name.removesuffix(".weight")
            for name, value in weights.items()
            if name.endswith(".weight") and value.shape[1:] == wanted.shape[1:] and name.split(".")[-2] in names
        ]
        if len(fitting) == 1:
            parts = [part for part in ("weight", "bias") if f"{fitting[0]}.{part}" in weights]
            beside |= {f"{layer}.{part}": weights[f"{fitting[0]}.{part}"] for part in parts}
    return beside
