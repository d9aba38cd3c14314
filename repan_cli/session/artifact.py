"""Open the network that fuse, evaluate, predict, benchmark or quantize gets: from a file, or by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from repan_cli import checkpoint, models
from repan_cli.blocks import NATIVE, rep_blocks, use_block
from repan_cli.checkpoint.card import MULTI_BRANCH, PLAIN, ModelCard
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.conventions import (
    CENTER,
    CROP_MODES,
    CROP_SHARE,
    INTERPOLATION,
    INTERPOLATIONS,
    LARGE_IMAGE,
    is_resized,
)
from repan_cli.config.names import TIMM
from repan_cli.data.preprocess import MiddleCrop, Preparation
from repan_cli.errors import InputError
from repan_cli.export import onnx_file, pt2_file, runtimes
from repan_cli.models import user_file
from repan_cli.models.changes import Expansion
from repan_cli.models.foreign import fit
from repan_cli.models.inspect import classifier_layers, wanted_images
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.session import hub_folder
from repan_cli.session.noted_name import how_to_name
from repan_cli.session.sources import file_of
from repan_cli.system.notices import doing, warn
from repan_cli.system.weight_files import RUNTIME_DESCRIPTION

OUR_IMAGE, OUR_CLASSES, IMAGENET_CLASSES = 32, 100, 1000


@dataclass(frozen=True)
class Artifact:
    """A network in eval mode on the CPU, with its description.

    `runtime` names the program that computes: PyTorch, or the program that the file was made for.
    """

    source: str
    network: nn.Module
    card: ModelCard
    runtime: str = "PyTorch"
    saved: Checkpoint | None = field(default=None, repr=False)

    @property
    def form(self) -> str:
        return self.card.form

    @property
    def preparation(self) -> Preparation:
        """Return the preprocessing of the network's images."""
        card = self.card
        return Preparation(
            size=card.image_size,
            channels=card.in_chans,
            mean=(0.0,) * card.in_chans if card.normalizes else card.mean,
            std=(1.0,) * card.in_chans if card.normalizes else card.std,
            resized=is_resized(card.settings.get("data.crop", "auto"), card.image_size),
            crop=MiddleCrop(
                share=CROP_SHARE if card.crop_share is None else card.crop_share,
                mode=card.crop_mode or CENTER,
                interpolation=card.interpolation or INTERPOLATION,
                fill=card.mean,
            ),
        )

    def checkpoint(self) -> Checkpoint:
        """Return the network as a checkpoint, in its present form."""
        return self.saved or checkpoint.capture(self.network, self.card)


def open_artifact(
    source: str,
    model: str | None = None,
    *,
    pretrained: bool = True,
    block: str | None = None,
    trusted: bool = False,
) -> Artifact:
    """Open the network in a file or a run directory, or a pretrained network by name.

    Args:
        source: a file that repan wrote, another program's weights (with `model`), a run directory, a network's name, or
            `hf-hub:ORG/NAME`.
        model: the network to which another program's weights belong, or your own network, `file.py:function`.
        pretrained: whether a network given by name gets the weights that timm or torchvision offers.
        block: the block family of a network given by name, if it is built of blocks. For a file with user-defined
            blocks, the family's name, `file.py:function`.
        trusted: whether the code in a TorchScript file may be run.

    Raises InputError, naming the source, if it is missing or damaged, or does not name its network.
    """
    plain, key = checkpoint.split_key(hub_folder.fetched(source))
    path = file_of(str(plain))
    if path is None:
        return _named(source, pretrained=pretrained, block=block)
    if path.suffix == ".onnx":
        file = onnx_file.read(path)
        card = _described(path, file.header)
        if file.change:
            warn(f"{path} was {file.change}")
        return Artifact(str(path), file.network(), card, "ONNX Runtime")
    if path.suffix == ".pt2":
        checkpoint.check_seal(path)
        program = pt2_file.open_file(path)
        return Artifact(str(path), program, _described(path, pt2_file.header(path)), "torch.export")
    if path.name == RUNTIME_DESCRIPTION:
        return _of_runtime(path, trusted=trusted)
    with doing(f"loading {path}"):
        content = checkpoint.load_any(path if key is None else f"{path}::{key}")
        if isinstance(content, Checkpoint):
            network = models.rebuild(content, str(path), model, block)
            return Artifact(str(path), network, content.card, saved=content)
        return open_weights(path, content, model)


def _of_runtime(description: Path, *, trusted: bool) -> Artifact:
    """Open the network in another program's files. Raises InputError if they contain code, unless `trusted` is true."""
    name, text = runtimes.opened(description, runtimes.KINDS)
    kind, folder = runtimes.KINDS[name], description.parent
    if name == "torchscript" and not trusted:
        raise InputError(f"{folder} holds a TorchScript program, which is code: if you trust it, give --trust-code")
    card = _described(description, text)
    return Artifact(str(folder), kind.open(folder), card, kind.title)


def written_in(header: str | None) -> tuple[ModelCard, str] | None:
    """Return the card and the digest in the header of an exported file; None if repan did not write it."""
    try:
        told = json.loads(header) if header else None
        return (ModelCard.from_meta(told["meta"]), str(told["digest"])) if told else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _described(path: Path, header: str | None) -> ModelCard:
    written = written_in(header)
    if written is None:
        raise InputError(f"{path} was not written by repan fuse, so its classes and images are not known")
    return written[0]


# ---------------------------------------------------------------------------------------------- networks by name


def _named(name: str, *, pretrained: bool, block: str | None) -> Artifact:
    if user_file.names_a_file(name):
        raise InputError(f"{name} is a network without weights: give the file of its weights, and --model {name}")
    use_block(block)
    full = models.resolve(name, LARGE_IMAGE)
    if full in models.BUILTIN and pretrained:
        raise InputError(f"{full} is a network without weights: train it, then give its checkpoint")
    model = models.create(full, num_classes=_classes_of(full), in_chans=3, block=block, pretrained=pretrained)
    return _as_artifact(name, full, model.eval())


def _classes_of(full: str) -> int:
    """Return the number of classes of a network's pretrained weights; for repan's own networks that of CIFAR-100."""
    if full in models.BUILTIN:
        return OUR_CLASSES
    cfg = timm.get_pretrained_cfg(full.removeprefix(TIMM), allow_unregistered=True)
    return cfg.num_classes if cfg is not None and full.startswith(TIMM) else IMAGENET_CLASSES


def open_weights(path: Path, weights: Mapping[str, Tensor], name: str | None) -> Artifact:
    """Load another program's weights into the network `name`.

    The shapes of the weights give the number of classes and channels.
    """
    told = hub_folder.described(path)
    if name is None:
        if told is None:
            raise InputError(f"{path} was not written by repan and does not name its network: {how_to_name(str(path))}")
        name = told.network
    full = name if user_file.names_a_file(name) else models.resolve(name, LARGE_IMAGE)
    with torch.random.fork_rng(devices=[]):
        probe = models.create(full, num_classes=IMAGENET_CLASSES, in_chans=3)
        found = fit(probe, weights).weights
        rows = [f"{layer}.weight" for layer in classifier_layers(probe)]
        classes = next((len(found[key]) for key in rows if key in found), IMAGENET_CLASSES)
        first = next((key for key, value in probe.state_dict().items() if value.ndim == 4), "")
        channels = found[first].shape[1] if first in found and found[first].ndim == 4 else 3
        model = models.create(full, num_classes=classes, in_chans=channels)
    models.load_foreign(model, weights, str(path))
    return _as_artifact(str(path), full, model.eval(), told if told is not None and told.network == full else None)


def _as_artifact(source: str, full: str, model: nn.Module, described: hub_folder.Described | None = None) -> Artifact:
    """Describe another program's network, by the description next to its weights and by timm's preprocessing for its
    name.
    """
    wanted = wanted_images(model) if hasattr(model, "pretrained_cfg") else {}
    wanted = {**wanted, **(described.images if described else {})}
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = convs[0].in_channels * convs[0].groups if convs and convs[0].groups == 1 else 3
    told = getattr(model, "num_classes", None)
    classes = told if isinstance(told, int) else _outputs(model)
    branches = any(is_own_block(module) for module in model.modules())
    own = Expansion(next((block.family for _, block in rep_blocks(model)), NATIVE), (), {})
    native = {"block": own.family, "branches": None} if full in models.BUILT_OF_BLOCKS else {}
    card = ModelCard(
        model=full,
        block=own.family,
        form=MULTI_BRANCH if branches or models.form_of(model) == MULTI_BRANCH else PLAIN,
        structure=own.structure(native),
        classes=_names(classes, described),
        in_chans=channels,
        image_size=OUR_IMAGE if full in models.BUILTIN else wanted.get("input_size", (LARGE_IMAGE,))[-1],
        mean=_of_channels(wanted.get("mean", timm.data.IMAGENET_DEFAULT_MEAN), channels),
        std=_of_channels(wanted.get("std", timm.data.IMAGENET_DEFAULT_STD), channels),
        crop_share=wanted.get("crop_pct", CROP_SHARE),
        crop_mode=_unusual(wanted.get("crop_mode"), CROP_MODES),
        interpolation=_unusual(wanted.get("interpolation"), INTERPOLATIONS),
    )
    return Artifact(source, model, card)


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; the values repeat if there are more channels than values."""
    return tuple(itertools.islice(itertools.cycle(values), channels))


def _unusual(value: object, known: Sequence[str]) -> str | None:
    """Return a known value, but None for the first, usual one, which files leave out."""
    return value if isinstance(value, str) and value in known[1:] else None


def _names(count: int, described: hub_folder.Described | None) -> tuple[str, ...]:
    if described is not None and described.classes is not None and len(described.classes) == count:
        return described.classes
    return tuple(class_names(count))


def are_of_imagenet(classes: Sequence[str]) -> bool:
    """Return whether classes are ImageNet's synsets, in the order that all networks for it use."""
    info = timm.data.ImageNetInfo()
    return [*classes] == [info.index_to_label_name(index) for index in range(len(classes))] and len(classes) > 1


def _outputs(model: nn.Module) -> int:
    layers = classifier_layers(model)
    weight = model.get_submodule(layers[-1]).weight if layers else None
    return len(weight) if isinstance(weight, Tensor) else IMAGENET_CLASSES


def class_names(count: int) -> list[str]:
    """Return the names of ImageNet's classes if there are as many; otherwise numbers."""
    if count == IMAGENET_CLASSES:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(index) for index in range(count)]
    return [str(index) for index in range(count)]
