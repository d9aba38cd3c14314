"""Networks: importing this registers ours with timm; `resolve` turns what people type into a timm name."""

from repan_cli.models import repvgg_cifar
from repan_cli.models.create import OURS, SMALL_IMAGE, create, form_of, load, rebuild, resolve

__all__ = ["OURS", "SMALL_IMAGE", "create", "form_of", "load", "rebuild", "repvgg_cifar", "resolve"]
