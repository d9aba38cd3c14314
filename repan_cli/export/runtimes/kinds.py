"""The declaration of a format of another program."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repan_cli.errors import InputError
from repan_cli.system.text import first_line

INPUT = "images"


@dataclass(frozen=True)
class Conversion:
    """The merged network to convert, on the CPU, with sample images (N, C, H, W).

    `onnx` returns its ONNX file, from which some converters start. `source` names it in messages.
    """

    network: nn.Module
    images: Tensor
    source: str
    onnx: Callable[[], bytes]


@dataclass(frozen=True)
class Kind:
    """A format of another program.

    Attributes:
        files: the names that its folder may hold.
        convert: returns their content.
        open: returns the network in a folder, run by the program.
        why_not: returns why this machine cannot run it.
        use: a line of code, with the folder as {folder}.
        any_batch: whether it takes several images at once.
    """

    title: str
    files: tuple[str, ...]
    convert: Callable[[Conversion], dict[str, bytes]]
    open: Callable[[Path], nn.Module]
    use: str
    why_not: Callable[[], str | None] = lambda: None
    any_batch: bool = True


def cannot(title: str, conversion: Conversion, error: Exception) -> InputError:
    """Return the error for a network that a converter does not accept."""
    return InputError(f"{conversion.source} cannot be written for {title}: {first_line(error)}")


class OneByOne(nn.Module, abc.ABC):
    """A network that another program runs for one image (1, C, H, W) at a time; this class accepts any number."""

    @abc.abstractmethod
    def run(self, image: Tensor) -> Tensor:
        """Return the logits (1, classes) of one image."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found = [self.run(image[None]) for image in images.detach().cpu().float().contiguous()]
        return torch.cat(found).to(images.device)
