"""Networks: importing this registers ours with timm; `resolve` turns what people type into a full name."""

from repan_cli.models import mobilenet_cifar, repvgg_cifar, resnet_cifar
from repan_cli.models.create import (
    BUILT_OF_BLOCKS,
    OURS,
    SMALL_IMAGE,
    blank,
    check_given,
    create,
    describe,
    form_of,
    has_new_classifier,
    load,
    rebuild,
    resolve,
)
from repan_cli.models.expand import Change, Expansion, Selection, apply, expand, plan, summary

__all__ = [
    "BUILT_OF_BLOCKS",
    "OURS",
    "SMALL_IMAGE",
    "Change",
    "Expansion",
    "Selection",
    "apply",
    "blank",
    "check_given",
    "create",
    "describe",
    "expand",
    "form_of",
    "has_new_classifier",
    "load",
    "mobilenet_cifar",
    "plan",
    "rebuild",
    "repvgg_cifar",
    "resnet_cifar",
    "resolve",
    "summary",
]
