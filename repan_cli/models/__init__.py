"""Build networks.

Importing this registers repan's own networks with timm; `resolve` turns a user's name into a full one.
"""

from repan_cli.checkpoint.card import Change
from repan_cli.config.conventions import SMALL_IMAGE
from repan_cli.models.author_names import holds_branches
from repan_cli.models.changes import Expansion, Selection, apply, summary
from repan_cli.models.create import BUILT_OF_BLOCKS, BUILTIN, create, has_new_classifier, resolve, wanted_size
from repan_cli.models.expand import expand, plan
from repan_cli.models.foreign import load_foreign
from repan_cli.models.inspect import form_of
from repan_cli.models.own_block import given_again
from repan_cli.models.rebuild import build_untrained, check_given, load, rebuild

__all__ = [
    "BUILTIN",
    "BUILT_OF_BLOCKS",
    "SMALL_IMAGE",
    "Change",
    "Expansion",
    "Selection",
    "apply",
    "build_untrained",
    "check_given",
    "create",
    "expand",
    "form_of",
    "given_again",
    "has_new_classifier",
    "holds_branches",
    "load",
    "load_foreign",
    "mobilenet_cifar",
    "plan",
    "rebuild",
    "repvgg_cifar",
    "resnet_cifar",
    "resolve",
    "summary",
    "wanted_size",
]
