"""Describe a network in a checkpoint, and build it again from that description."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from repan_cli import checkpoint
from repan_cli.blocks import reparameterize
from repan_cli.checkpoint.card import FUSED, Change, ModelCard
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.errors import InputError
from repan_cli.models import own_block, user_file
from repan_cli.models.changes import Expansion, apply, set_report
from repan_cli.models.create import create
from repan_cli.system.python_words import told_in_python

TIMES_THE_FILE, TIMES_THE_NAMES = 8, 16
"""Limits of a network while it is built, as multiples of its file's bytes and tensors.

Branches that are merged at once count too.
"""

LEAST_BYTES, LEAST_TENSORS = 2**26, 2**12
"""The bytes and tensors that every network may have, however small its file."""


def build_untrained(
    saved: Checkpoint, source: str, network: nn.Module | str | None = None, block: str | None = None
) -> nn.Module:
    """Build the network that a checkpoint describes, in its form, with fresh weights.

    Give a user-defined network again as `network`, the plain module or its name, and your own block family as `block`.
    Files named in a checkpoint are never imported.

    Raises InputError if one of these is missing. It also refuses a network that is far larger than the weights, because
    a tiny file could fill the memory by naming a giant network.
    """
    card = own_block.given_again(saved.card, block, source)
    with contextlib.nullcontext() if _is_of_a_user(card, network) else _no_larger_than(saved.weights, source):
        return _build(card, source, network)


def _is_of_a_user(card: ModelCard, network: nn.Module | str | None) -> bool:
    """Return whether a network is built by a user's code."""
    return isinstance(network, nn.Module) or user_file.names_a_file(card.model) or bool(own_block.needed(card))


@contextlib.contextmanager
def _no_larger_than(weights: Mapping[str, Tensor], source: str) -> Iterator[None]:
    """Stop building a network, before its memory is touched, as soon as it is far larger than its weights."""
    most = LEAST_BYTES + TIMES_THE_FILE * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    most_tensors = LEAST_TENSORS + TIMES_THE_NAMES * len(weights)
    found = count = 0

    def registered(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal found, count
        if tensor is not None:
            found, count = found + tensor.numel() * tensor.element_size(), count + 1
            if found > most or count > most_tensors:
                raise InputError(
                    f"{source} does not fit the network: it describes a network many times larger than the file"
                )

    hooks = [register(registered) for register in REGISTERED]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


REGISTERED = (register_module_parameter_registration_hook, register_module_buffer_registration_hook)


def _build(card: ModelCard, source: str, network: nn.Module | str | None) -> nn.Module:
    native, expansion = card.structure.native, Expansion.from_card(card)
    changes = list(expansion.changes)
    if card.form == FUSED:  # there is no need to make branches that would only be merged
        native = {**native, "block": "plain", "branches": None} if native else native
        changes = [_without_branches(change) for change in changes if change.kind != "grow"]
    if isinstance(network, nn.Module):
        model = network
    else:
        name = _own_or_stored(card.model, network, source)
        model = create(name, num_classes=len(card.classes), in_chans=card.in_chans, **native)
    try:
        model = apply(model, changes)
    except AttributeError as error:
        raise InputError(f"{source} does not fit the network: it lacks a layer ({error})") from None
    set_report(model, expansion)
    return reparameterize(model) if card.form == FUSED else model


def _without_branches(change: Change) -> Change:
    return change._replace(family="plain", copies=None) if change.kind == "expand" else change


def check_given(stored: str, given: str | None, source: str) -> None:
    """Raise InputError if a user-defined network was not given again; no file is imported automatically."""
    if user_file.names_a_file(stored) and given is None:
        raise InputError(
            f"{source} holds a network of your own, {stored}: give --model {stored} "
            "(files are not imported automatically)"
        )


def _own_or_stored(stored: str, given: str | None, source: str) -> str:
    check_given(stored, given, source)
    if given is not None and user_file.names_a_file(stored):
        return given
    if given not in (None, stored):
        raise InputError(f"{source} holds {stored}; --model is for a network of your own")
    return stored


def rebuild(
    saved: Checkpoint, source: str, network: nn.Module | str | None = None, block: str | None = None
) -> nn.Module:
    """Rebuild the network in a checkpoint, multi-branch or fused as it was saved, on the CPU in eval mode.

    `source` names the file in errors; `network` and `block` are as for `build_untrained`. Raises InputError if the
    weights do not fit the network that the file describes.
    """
    merges = any(change.kind == "merge" for change in saved.card.structure.changes)
    drawn = merges or _is_of_a_user(saved.card, network)  # a user-defined network may do anything with its weights
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if drawn else NothingIsDrawn():
        model = build_untrained(saved, source, network, block)
    checkpoint.load_weights(model, saved.weights, source)
    return model.eval()


DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
"""The functions that fill a tensor at random, and those of `nn.init` whose inside no torch function mode sees."""


class NothingIsDrawn(TorchFunctionMode):
    """Leave fresh weights uninitialized if all of them will be replaced: drawing 25 million takes 0.3 s."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def load(path: str | Path, model: nn.Module | str | None = None, *, block: str | None = None) -> nn.Module:
    """Load a network, ready to use, from any file that repan wrote, fused or not, in eval mode on the CPU.

    Args:
        path: a `.pt` or `.safetensors` file that repan wrote, or a run's folder, which stands for its best weights.
        model: for your own network, the plain module as it was before training, or its name `file.py:function`.
        block: for your own blocks that are not registered, their name `file.py:function`.

    Raises InputError, naming the file, if it is damaged, was not written by repan, or does not fit the network.
    """
    with told_in_python({"--model": "model", "--block": "block"}):
        file = checkpoint.chosen_in(path)
        return rebuild(checkpoint.load(file), str(file), model, block)
