"""Translate the names that authors of multi-branch blocks give their layers to timm's names.

Each family is a function from weights by the authors' names, without prefixes of trainers, to weights by timm's names.
`RENAMED` holds the names of the parts of blocks, `STAGES` the names of the blocks themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from repan_cli.models.author_blocks import blocks_in_place

Weights = Mapping[str, Tensor]

RENAMED = {
    "rbr_dense": "conv_kxk",  # RepVGG
    "rbr_1x1": "conv_1x1",
    "rbr_identity": "identity",
    "rbr_reparam": "reparam_conv",
    "rbr_conv": "conv_kxk",  # MobileOne, FastViT
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "branch_3x3": "conv_kxk",  # OpenMMLab
    "branch_1x1": "conv_1x1",
    "branch_norm": "identity",
    "branch_reparam": "reparam_conv",
    "branch_conv_list": "conv_kxk",
    "branch_scale": "conv_scale",
    "lkb_origin": "large_conv",  # FastViT's large kernels
    "lkb_reparam": "reparam_conv",
}
"""Parts of names, by the authors' word for them."""

STAGES = (
    (re.compile(r"^stage_?0\."), lambda found: "stem."),
    (re.compile(r"^stage_?([1-9])\."), lambda found: f"stages.{int(found[1]) - 1}."),
    (re.compile(r"\.(conv_kxk(?:\.\d+)?|conv_1x1|conv_scale)\.norm\."), lambda found: f".{found[1]}.bn."),
    (re.compile(r"\.se\.(?:reduce|down|conv1\.conv|conv1)\."), lambda found: ".attn.fc1."),
    (re.compile(r"\.se\.(?:expand|up|conv2\.conv|conv2)\."), lambda found: ".attn.fc2."),
)
"""Patterns of the names of RepVGG's and MobileOne's authors and of OpenMMLab, and timm's names in byobnet."""

SIGNS = {
    "multi-branch, the RepVGG authors' names": ("rbr_dense",),
    "merged, the RepVGG authors' names": ("rbr_reparam",),
    "multi-branch, the MobileOne authors' names": ("rbr_conv",),
    "multi-branch, OpenMMLab's names": ("branch_3x3", "branch_conv_list"),
    "merged, OpenMMLab's names": ("branch_reparam",),
    "merged, the FastViT authors' names": ("lkb_reparam",),
    "multi-branch, timm's names": ("conv_kxk",),
    "merged, timm's names": ("reparam_conv",),
    "multi-branch, the DBB authors' names": ("dbb_origin",),
    "merged, the DBB authors' names": ("dbb_reparam",),
    "multi-branch, the ACNet authors' names": ("square_conv",),
    "merged, the ACNet authors' names": ("fused_conv",),
    "multi-branch, the RepViT authors' names": ("token_mixer.0.conv.c",),
    "multi-branch, repan's names": (".trunk.conv",),
}
"""Parts of weight names that identify a form of other authors' multi-branch networks."""


SIGN_OF = {"acb": ".square_conv.", "dbb": ".dbb_origin."}
"""The part of a name that identifies the authors' blocks of each family."""


def form_in(weights: Iterable[str]) -> str | None:
    """Return the form and the family that the names of weights show; None for a plain network."""
    names = [*weights]
    return next((form for form, signs in SIGNS.items() if any(sign in name for sign in signs for name in names)), None)


def holds_branches(weights: Iterable[str], family: str | None) -> bool:
    """Return whether weights belong to a network that was expanded, by repan or into the authors' blocks of a family.

    They can be loaded once the network has such blocks.
    """
    names = [*weights]
    signs = [".trunk."] + [SIGN_OF[each] for each in SIGN_OF if each == family]
    return any(sign in f".{name}" for sign in signs for name in names)


def renamed(name: str) -> str:
    """Return a name in which the parts of its block have timm's names."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def _blocks(weights: Weights, model: nn.Module) -> Weights:
    """Rename the weights of RepVGG, MobileOne, and OpenMMLab's form of both."""
    found = {}
    for name, value in weights.items():
        name = renamed(name)
        for pattern, replacement in STAGES:
            name = pattern.sub(replacement, name)
        found[name] = value
    return found


def _densenet(weights: Weights, model: nn.Module) -> Weights:
    """Rename the weights of DenseNet in torchvision's form before 2018: `norm.1`, `conv.2`."""
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    return {old.sub(r"\1\2.", name): value for name, value in weights.items()}


REPVIT_PARTS = {
    "token_mixer.0.": "token_mixer.",
    "token_mixer.1.": "se.",
    "channel_mixer.m.0.": "channel_mixer.conv1.",
    "channel_mixer.m.2.": "channel_mixer.conv2.",
}
REPVIT_STRIDED = {
    "token_mixer.0.": "spatial_downsample.",
    "token_mixer.2.": "channel_downsample.",
    "channel_mixer.m.0.": "ffn.conv1.",
    "channel_mixer.m.2.": "ffn.conv2.",
}


def _repvit(weights: Weights, model: nn.Module) -> Weights:
    """Rename the weights of RepViT.

    The authors have one flat list of blocks; timm begins a new stage at each strided block.
    """
    front = {"features.0.0.": "stem.conv1.", "features.0.2.": "stem.conv2."}
    front |= {"classifier.classifier.": "head.head.", "classifier.classifier_dist.": "head.head_dist."}
    front |= {"classifier.weight": "head.weight", "classifier.bias": "head.bias"}
    for number, (place, parts) in enumerate(_repvit_places(model), 1):
        front |= {f"features.{number}.{theirs}": f"{place}.{ours}" for theirs, ours in parts.items()}
    found = {}
    for name, value in weights.items():
        start = next((each for each in front if name.startswith(each)), "")
        found[front.get(start, "") + name[len(start) :]] = value
    return found


def _repvit_places(model: nn.Module) -> Iterable[tuple[str, dict[str, str]]]:
    for stage, module in model.get_submodule("stages").named_children():
        if hasattr(module.get_submodule("downsample"), "pre_block"):
            yield f"stages.{stage}.downsample.pre_block", REPVIT_PARTS
            yield f"stages.{stage}.downsample", REPVIT_STRIDED
        for block, _ in module.get_submodule("blocks").named_children():
            yield f"stages.{stage}.blocks.{block}", REPVIT_PARTS


FAMILIES: tuple[Callable[[Weights, nn.Module], Weights], ...] = (_blocks, _densenet, _repvit, blocks_in_place)
"""Every translation, tried in turn; one that is made for another network finds nothing."""
