"""Make augmentation policies from torchvision and timm, for one picture at a time."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torchvision import transforms

Policy = Callable[[Image.Image], Image.Image]


FILL = {1: (117,), 3: (124, 116, 104)}
"""The mean of ImageNet by the number of channels, for what a policy moves into a picture."""


def policy(name: str, found_for: str, channels: int = 3) -> Policy:
    """Return the policy that the setting `data.augment` names; for `autoaugment`, the one that was `found_for` the
    data.

    AutoAugment (Cubuk et al. 2018; for ImageNet in TensorFlow's version), RandAugment (Cubuk et al. 2019),
    TrivialAugment (Mueller & Hutter 2021).
    """
    if name == "autoaugment":
        return _autoaugment(found_for, channels)
    return {"randaugment": transforms.RandAugment, "trivialaugment": transforms.TrivialAugmentWide}[name]()


def _autoaugment(found_for: str, channels: int) -> Policy:
    if found_for == "imagenet":
        from timm.data.auto_augment import auto_augment_transform

        # v0 may ask Pillow for 0 bits per color, which newer versions refuse and older ones show as black
        return auto_augment_transform("v0r", {"img_mean": FILL[channels]})
    return transforms.AutoAugment(transforms.AutoAugmentPolicy(found_for))
