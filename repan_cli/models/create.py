"""Create a network from the name that a user typed."""

from __future__ import annotations

import logging
import re
from typing import Any

import timm
import torchvision
from torch import nn

from repan_cli.blocks import NATIVE, check_family
from repan_cli.config.conventions import LARGE_IMAGE, SMALL_IMAGE
from repan_cli.config.names import ALIASES, SMALL, TIMM, TORCHVISION, unknown_model
from repan_cli.errors import InputError
from repan_cli.models import mobilenet_cifar, repvgg_cifar, resnet_cifar, user_file
from repan_cli.models.expand import DEFAULT_FAMILY
from repan_cli.models.foreign import load_foreign
from repan_cli.models.inspect import classifier_layers
from repan_cli.system.notices import doing
from repan_cli.system.text import first_line

BUILT_OF_BLOCKS: tuple[str, ...] = tuple(repvgg_cifar.default_cfgs)
"""The networks of this package that are built of blocks; all others are plain at first."""

BUILTIN: tuple[str, ...] = (*BUILT_OF_BLOCKS, *resnet_cifar.default_cfgs, *mobilenet_cifar.default_cfgs)
"""The networks of this package."""


OWN_IMAGE = 32
"""Side in pixels that the networks of this package are made for."""

WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""torchvision's networks that return more than logits in train mode, unless told otherwise."""


def resolve(name: str, image_size: int) -> str:
    """Return the full name that `name` stands for, for images of `image_size` pixels.

    `timm:NAME` and `torchvision:NAME` are taken literally, and `file.py:function` is a user's own network. `repvgg` is
    `repvgg_a1`. For small images, a short name means `NAME_cifar` if that exists. Otherwise it means timm's network.

    Raises InputError, with the closest names, for a name that does not exist.
    """
    if user_file.names_a_file(name):
        return name
    if name.startswith(TORCHVISION):
        return _known(name, [TORCHVISION + known for known in torchvision.models.list_models(torchvision.models)])
    name = re.sub(rf"^(?:{TIMM})?hf[-_]hub:timm/", TIMM, name)
    if name.removeprefix(TIMM).startswith(("hf-hub:", "hf_hub:")):
        raise InputError(f"{name} is not the name of a network: give it in place of a file, or as --init")
    if timm.is_model(tagged := name.removeprefix(TIMM)) and "." in tagged:
        return TIMM + _with_tag(tagged)
    if name.startswith(TIMM):
        return _known(name, [TIMM + known for known in timm.list_models()])
    full = ALIASES.get(name, name)
    small = f"{SMALL.get(full, full)}_cifar"
    if image_size <= SMALL_IMAGE and small in BUILTIN:
        return small
    if full in BUILTIN:
        return full
    return TIMM + _known(full, list(dict.fromkeys([*ALIASES, *BUILTIN, *timm.list_models()])))


def wanted_size(name: str) -> int | None:
    """Return the side of the images that a network is made for; None for a user-defined network, which does not tell.

    A short name means timm's network, as for large images, or the network for small images if timm has none.
    """
    if user_file.names_a_file(name):
        return None
    try:
        full = resolve(name, LARGE_IMAGE)
    except InputError:
        full = resolve(name, SMALL_IMAGE)
    if full in BUILTIN:
        return OWN_IMAGE
    if full.startswith(TORCHVISION):
        preset = torchvision.models.get_model_weights(full.removeprefix(TORCHVISION)).DEFAULT.transforms()
        return int(preset.crop_size[0])
    known = timm.get_pretrained_cfg(full.removeprefix(TIMM), allow_unregistered=True)
    return int(known.input_size[-1]) if known is not None else LARGE_IMAGE


def _with_tag(name: str) -> str:
    """Return timm's name with the tag of its pretrained weights. Raises InputError for an unknown tag."""
    short, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{short}.*")]
    if tag not in tags:
        raise InputError(f"timm has no weights '{tag}' of {short}: it has {', '.join(tags) or 'none'}")
    return name


def _known(name: str, choices: list[str]) -> str:
    if name not in choices:
        raise unknown_model(name, choices)
    return name


def create(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    block: str | None = None,
    branches: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Create a network by its full name, as `resolve` returns it; `expand` is the next step.

    repan's networks that are built of blocks get the family `block` with `branches` branches. All others are as their
    authors build them. With `pretrained` they get the weights that timm or torchvision offers, and a new classifier if
    these weights have another number of classes.
    """
    if block not in (None, NATIVE):
        check_family(block, branches)
    if pretrained and not name.startswith((TIMM, TORCHVISION)):
        raise InputError(f"there are no pretrained weights of {name}; give a file of weights with --init")
    if user_file.names_a_file(name):
        return user_file.build(name, num_classes=num_classes, in_chans=in_chans)
    if name.startswith(TORCHVISION):
        return _torchvision(name, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if name in BUILT_OF_BLOCKS:
        kwargs |= {"block": DEFAULT_FAMILY if block in (None, NATIVE) else block, "branches": branches}
    return _timm(name, pretrained=pretrained, **kwargs)


def _timm(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):  # a Hub name in a file is not followed either
        raise InputError(f"this timm ({timm.__version__}) has no model {short}; another version may have it")
    if pretrained and not timm.is_model_pretrained(short):
        raise InputError(f"timm has no pretrained weights of {short}; give a file of weights with --init")
    try:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would print every attempt
        with doing(f"fetching the weights of {short}" if pretrained else f"building {short}"):
            return timm.create_model(short, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise
        raise _not_fetched(name, error) from error


def _torchvision(name: str, *, num_classes: int, in_chans: int, pretrained: bool) -> nn.Module:
    short = name.removeprefix(TORCHVISION)
    if in_chans != 3:
        raise InputError(f"torchvision's networks read 3 channels, the images have {in_chans}: use one of timm's")
    if short not in torchvision.models.list_models(torchvision.models):
        raise InputError(
            f"this torchvision ({torchvision.__version__}) has no model {short}; another version may have it"
        )
    auxiliary = {"aux_logits": False, "init_weights": True} if short in WITH_AUXILIARY_HEADS else {}
    model = torchvision.models.get_model(short, weights=None, num_classes=num_classes, **auxiliary)
    if pretrained:
        try:
            with doing(f"fetching the weights of {short}"):
                weights = torchvision.models.get_model_weights(short).DEFAULT.get_state_dict(
                    progress=False, check_hash=True
                )
        except Exception as error:
            raise _not_fetched(name, error) from error
        main = {key: value for key, value in weights.items() if not (auxiliary and key.lower().startswith("aux"))}
        load_foreign(model, main, f"the pretrained {short}", may_be_new=classifier_layers(model))
    return model


def _not_fetched(name: str, error: Exception) -> InputError:
    """Return the error with the network's full name, since a short one may mean repan's own network."""
    return InputError(
        f"cannot fetch the pretrained weights of {name} ({first_line(error)}); give a file of weights: --init FILE to "
        f"train, else FILE --model {name}"
    )


def has_new_classifier(name: str, num_classes: int) -> bool:
    """Return whether the pretrained weights of a network have another number of classes."""
    if name.startswith(TORCHVISION):
        meta = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.meta
        return len(meta.get("categories", ())) != num_classes
    known = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    return known is None or known.num_classes != num_classes
