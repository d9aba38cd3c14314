"""Make the network of a run: find its name, create or load it, expand it into blocks."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from repan_cli import checkpoint, models
from repan_cli.blocks import rep_blocks, use_block
from repan_cli.checkpoint.card import RunState
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.conventions import LARGE_IMAGE
from repan_cli.config.settings import Config, replace
from repan_cli.data.types import Dataset
from repan_cli.errors import InputError, unordered
from repan_cli.export.fuse import check_finite
from repan_cli.models import Expansion, Selection, own_block, probe, user_file
from repan_cli.models.inspect import classifier_layers
from repan_cli.models.probe import PROBE_IMAGES
from repan_cli.runs.directory import LAST
from repan_cli.session import hub_folder, same_data
from repan_cli.session.noted_name import how_to_name
from repan_cli.system.copies import deep_copy
from repan_cli.system.device import Runtime
from repan_cli.system.notices import warn
from repan_cli.system.seeding import seed_for
from repan_cli.system.text import count, first_line, quoted

Weights = Checkpoint | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Network:
    """A network with its blocks, and its origin.

    `native` holds the block family and the branches of a network that was created with blocks. `trained` is true if its
    weights were loaded. `new_classifier` is true if the weights of its classifier were not.
    """

    model: nn.Module
    name: str
    expansion: Expansion
    native: Mapping[str, Any]
    trained: bool
    new_classifier: bool

    @property
    def finished(self) -> bool:
        """Return whether the network needs no baseline."""
        return self.trained and not self.new_classifier


def read_weights(config: Config) -> Weights:
    """Read the initial weights, if the settings name a file of them."""
    return checkpoint.load_any(hub_folder.file_of(config.model.init)) if config.model.init else None


def wanted_size(config: Config, weights: Weights) -> int:
    """Return the side of the images that the network was made for, or was trained on."""
    if isinstance(weights, Checkpoint):
        return weights.card.image_size
    told = (
        hub_folder.described(checkpoint.split_key(hub_folder.file_of(_source(config)))[0])
        if weights is not None
        else None
    )
    if told is not None and "input_size" in told.images:
        return int(told.images["input_size"][-1])
    name = config.model.name or (told.network if told is not None else None)
    size = models.wanted_size(name) if name is not None else None
    return LARGE_IMAGE if size is None else size


def build(command: str, config: Config, dataset: Dataset, weights: Weights = None) -> Network:
    """Build the network that a configuration describes, with `weights` if it starts from a file.

    Raises InputError for a network that cannot be found or used.
    """
    use_block(config.block.name)
    weights = read_weights(config) if weights is None else weights
    name = _full_name(config, dataset, weights)
    torch.manual_seed(seed_for("weights", config.run.seed))
    if isinstance(weights, Checkpoint):
        network = _continued(config, dataset, name, weights)
    else:
        network = _created(config, dataset, name, weights)
    if weights is not None:
        check_finite(network.model)
    if command == "cycle" and not any(rep_blocks(network.model)):
        if isinstance(weights, Checkpoint) and config.block.name is None:
            raise InputError(f"{_source(config)} is a plain network: give --block NAME (see 'repan list blocks')")
        left = models.summary(network.expansion.left)
        raise InputError(f"no convolution of {name} can become a block: {left}")
    if command == "cycle" and config.cycle.restart == "repan" and models.form_of(network.model) == checkpoint.PLAIN:
        warn("this network's blocks have no side branches to regrow: give --block NAME, see 'repan list blocks'")
    return network


def restarted(config: Config, model: nn.Module) -> frozenset[str] | None:
    """Return the names of the blocks that restart, as chosen by the section `block`; None means all."""
    convs = {name: block.trunk.conv for name, block in rep_blocks(model)}
    block = config.block
    left_out = Selection(block.kernel or None, block.include, block.exclude, block.limit).left_out(convs)
    if convs and len(left_out) == len(convs):
        raise InputError(f"the settings block.* leave no block to restart: {models.summary(left_out)}")
    return frozenset(convs) - left_out.keys() if left_out else None


def noise(dataset: Dataset) -> Tensor:
    """Return random images, for trying out the network."""
    return probe.noise(PROBE_IMAGES, dataset.channels, dataset.image_size, dataset.image_size)


def _source(config: Config) -> str:
    """Return the file of the initial weights."""
    assert config.model.init is not None, "the weights were read from this file"
    return config.model.init


def _full_name(config: Config, dataset: Dataset, weights: Weights) -> str:
    if config.model.name is not None:
        return models.resolve(config.model.name, dataset.image_size)
    if isinstance(weights, Checkpoint):
        _with_own_blocks(config, weights, _source(config))  # report a missing file at once
        models.check_given(weights.card.model, None, _source(config))
        return weights.card.model
    told = hub_folder.described(checkpoint.split_key(hub_folder.file_of(_source(config)))[0])
    if told is not None:
        return told.network
    raise InputError(f"{_source(config)} does not name its network: {how_to_name(_source(config))}")


def _created(config: Config, dataset: Dataset, name: str, weights: Mapping[str, Tensor] | None) -> Network:
    """Create a network, fresh or with loaded weights, and expand it.

    Its branches train from the first step. If the function has to be kept, their output is zero at first.
    """
    classes = len(dataset.classes)
    model = models.create(
        name,
        num_classes=classes,
        in_chans=dataset.channels,
        block=config.block.name,
        branches=config.block.branches,
        pretrained=config.model.pretrained,
    )
    _check_output(model, name, dataset)
    new_classifier = config.model.pretrained and models.has_new_classifier(name, classes)
    trained = weights is not None or config.model.pretrained
    native = _native(name, model, config)
    multi_branch = weights is not None and not native and models.holds_branches(weights, config.block.name)
    if weights is not None and not multi_branch:
        new_classifier = _take(model, weights, config)
    family = native.get("block", config.block.name)
    expansion = _plan(model, config, dataset, family)
    models.apply(model, expansion.changes, attach="zero-gamma" if trained else "one")
    if weights is not None and multi_branch:
        new_classifier = _take(model, weights, config)
    return Network(model, name, expansion, native, trained, new_classifier)


def _native(name: str, model: nn.Module, config: Config) -> dict[str, Any]:
    if name not in models.BUILT_OF_BLOCKS:
        return {}
    return {"block": next(block.family for _, block in rep_blocks(model)), "branches": config.block.branches}


def _plan(model: nn.Module, config: Config, dataset: Dataset, family: str | None) -> Expansion:
    block = config.block
    selection = Selection(block.kernel, block.include, block.exclude, block.limit)
    return models.plan(model, noise(dataset), family=family, selection=selection, copies=block.branches)


def _take(model: nn.Module, weights: Mapping[str, Tensor], config: Config) -> bool:
    source, layers = _source(config), classifier_layers(model)
    new = models.load_foreign(model, weights, source, may_be_new=layers)
    if new:
        warn(f"{source} was trained with other classes: {', '.join(layers)} is re-initialized")
    return new


def _continued(config: Config, dataset: Dataset, name: str, saved: Checkpoint) -> Network:
    """Build the network of a checkpoint of repan. If it has no side branches, it may get those of another family."""
    source = _source(config)
    saved = _with_own_blocks(config, saved, source)
    _check_origin(config, dataset, name, saved)
    card = dataclasses.replace(saved.card, classes=tuple(dataset.classes))
    model = models.build_untrained(dataclasses.replace(saved, card=card), source, name)
    new_classifier = tuple(saved.card.classes) != card.classes
    weights = saved.weights
    if new_classifier:
        layers = classifier_layers(model)
        own = {n: value for n, value in model.state_dict().items() if n.rpartition(".")[0] in layers}
        weights = {**weights, **own}
        warn(
            f"{source} was trained with other classes{_other_names(card.classes, saved)}: {', '.join(layers)} is "
            "re-initialized"
        )
    checkpoint.load_weights(model, weights, source)
    _check_output(model, name, dataset)
    expansion = Expansion.from_card(saved.card)
    family = config.block.name or expansion.family
    if family != expansion.family:
        grown = _plan(model, config, dataset, family)
        models.apply(model, grown.changes, attach="zero-gamma")
        expansion = grown.after(expansion)
    return Network(model, name, expansion, saved.card.structure.native, True, new_classifier)


def _with_own_blocks(config: Config, saved: Checkpoint, source: str) -> Checkpoint:
    """Return a checkpoint in which user-defined blocks have the names that the settings give."""
    if not own_block.needed(saved.card):
        return saved
    return dataclasses.replace(saved, card=models.given_again(saved.card, config.block.name, source))


def _other_names(classes: Sequence[str], saved: Checkpoint) -> str:
    """Describe how two lists of classes of the same length differ."""
    if len(classes) != len(saved.card.classes):
        return ""
    first = next((a, b) for a, b in zip(saved.card.classes, classes, strict=True) if a != b)
    return f" ('{first[0]}', not '{first[1]}')"


def restore_network(config: Config, dataset: Dataset, saved: Checkpoint) -> Network:
    """Build the network of a resumed run. Raises InputError if the run's data have changed."""
    same_data.check_classes("the run", saved.card.classes, dataset)
    same_data.check_images(saved.card, dataset, Path(config.run.out or "") / LAST)
    name = config.model.name
    assert name is not None, "a resumed run has the full name of its network"
    saved = _with_own_blocks(config, saved, "the run")
    model = models.build_untrained(saved, "the run", name)
    checkpoint.load_weights(model, saved.weights, "the run")
    native = saved.card.structure.native
    expansion = Expansion.from_card(saved.card)
    return Network(model, name, expansion, native, state_of(saved, "the run").finished, False)


def state_of(saved: Checkpoint, source: str) -> RunState:
    """Return the state that a run resumes from. Raises InputError, naming the source, for a checkpoint without it."""
    if saved.card.run is None:
        raise InputError(f"{source} holds weights, but no state to resume from")
    return saved.card.run


def _check_origin(config: Config, dataset: Dataset, name: str, saved: Checkpoint) -> None:
    """Check that the initial weights belong to this network and these classes, in a form that can be trained."""
    card, source = saved.card, _source(config)
    if card.form == checkpoint.FUSED:
        raise InputError(
            f"{source} is fused and has no branches: start from last.pt, best.pt or cycle_NN.pt of its run, or from "
            f"the plain network that 'repan fuse {quoted(source)} --form conv-bn' writes, with --model"
        )
    if card.model != name and not (user_file.names_a_file(name) and user_file.names_a_file(card.model)):
        raise InputError(f"{source} holds the network {card.model}, not {name}: give --model as it was trained")
    if config.block.name not in (None, card.block) and card.form != checkpoint.PLAIN:
        raise InputError(
            f"{source} holds blocks of the family {card.block}, not {config.block.name}: give --block as it was "
            "trained (only a network trained with --block plain may get others)"
        )
    if same_data.is_split_otherwise(card, dataset):
        warn(f"{source} was trained with another validation part: some of its training images are now held out")


@torch.no_grad()
def _check_output(model: nn.Module, name: str, dataset: Dataset) -> None:
    """Check that a network returns one tensor with one logit per class, in eval mode and in train mode.

    The check uses a copy, because train mode changes BN statistics.
    """
    images, copied = noise(dataset), deep_copy(model)
    expected = (len(images), len(dataset.classes))
    for mode in (False, True):
        try:
            with torch.random.fork_rng(devices=[]):
                logits = copied.train(mode)(images)
        except Exception as error:
            line = first_line(error).rstrip(". ")
            size = f"{dataset.channels}x{dataset.image_size}x{dataset.image_size}"
            refused = InputError(f"{name} does not run on images of {size}: {line}; {_mend(name, line)}")
            raise unordered(error) or refused from error
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        if found != expected:
            raise InputError(
                f"{name} returns {found} for {len(images)} images, not {expected}: it must return one logit per class"
                + (" (take num_classes as an argument)" if user_file.names_a_file(name) else "")
            )


CHANNELS = re.compile(r"to have (1|3) channels, but got (?:1|3) channels")
"""PyTorch's words for images with other channels than the first convolution reads."""


def _mend(name: str, line: str) -> str:
    """Suggest a fix for a network that does not run on the images, given the line of its error."""
    if channels := CHANNELS.search(line):
        return f"let it take in_chans as an argument, or set data.channels={channels[1]}"
    if user_file.names_a_file(name):
        return "let it take in_chans as an argument, or set data.image_size"
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm:"), allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        return f"it wants data.image_size={cfg.input_size[-1]}"
    return "set a larger data.image_size"


@torch.no_grad()
def safe_precision(machine: Runtime, network: Network, dataset: Dataset, *, chosen: str) -> Runtime:
    """Return the runtime, changed to fp32 with a warning if bf16 would give wrong gradients.

    On CPUs, PyTorch's bf16 gradient of a strided convolution holds uninitialized memory if its input map is smaller
    than the stride (seen in 2.15). Deep networks on small images have such maps.
    """
    if machine.device.type != "cpu" or machine.precision != "bf16":
        return machine
    found: list[str] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda conv, inputs, name=name: found.append(name) if _smaller_than_stride(conv, inputs[0]) else None
        )
        for name, module in network.model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    modes = {module: module.training for module in network.model.modules()}
    network.model.eval()(noise(dataset))
    for module, mode in modes.items():
        module.training = mode
    for hook in hooks:
        hook.remove()
    if not found:
        return machine
    why = f"{found[0]} reads a map smaller than its stride, where PyTorch's bf16 gradients are wrong on CPUs"
    if chosen != "auto":
        warn(f"{why}: set run.precision=fp32, or a larger data.image_size")
        return machine
    warn(f"{why}: this run uses fp32 (a larger data.image_size would allow bf16)")
    return dataclasses.replace(machine, precision="fp32")


def _smaller_than_stride(conv: nn.Conv2d, images: Tensor) -> bool:
    return max(conv.kernel_size) > 1 and any(
        side < stride for side, stride in zip(images.shape[-2:], conv.stride, strict=True)
    )


def describe_blocks(model: nn.Module) -> str:
    """Return a text with the number of a network's blocks of each family."""
    counted = Counter(block.family for _, block in rep_blocks(model))
    return " and ".join(count(number, f"{family} block") for family, number in counted.items()) or "no blocks"


def resolve_names(config: Config, network: Network) -> Config:
    """Return the configuration with the full names of the network and its block family."""
    return replace(config, {"model.name": network.name, "block.name": network.expansion.family})
