"""Draw the first training batch of a run, after augmentation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from repan_cli import runs
from repan_cli.data.batches import Batch, Loader
from repan_cli.display import pictures
from repan_cli.display.pictures import Captioned
from repan_cli.session.build import Session
from repan_cli.system.files import write_bytes

NAME = "images.png"
MOST = 32
LEAST_SHARE = 0.005
"""Shares of a label below this are not shown."""


def draw(session: Session, folder: runs.RunDirectory, batch: Batch) -> None:
    """Write a picture of the first images of a batch, as the network sees them, with their class names."""
    train, data = session.training.train, session.dataset
    shown = [*pictures.from_bytes(_pixels(batch.images[:MOST], train))]
    names = [_caption(label, data.classes) for label in batch.labels[:MOST].cpu()]
    title = f"the first training batch: {data.name}, {train.size}x{train.size}{_how(train)}"
    whole = pictures.mosaic([Captioned(*each) for each in zip(shown, names, strict=True)], title=title)
    content = io.BytesIO()
    whole.save(content, "PNG")
    write_bytes(folder / NAME, content.getvalue())


def _pixels(images: Tensor, train: Loader) -> list[tuple[bytes, int, int, int]]:
    """Undo the normalization of images (B, C, H, W); with more than three channels only the first is shown."""
    shift, scale = (part.view(1, -1, 1, 1).to(images.device) for part in (train.shift, train.scale))
    values = ((images.float() - shift) / scale).round().clamp(0, 255).to(torch.uint8)
    values = values if values.shape[1] in (1, 3) else values[:, :1]
    rows = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [(row.tobytes(), *row.shape) for row in rows]


def _caption(label: Tensor, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class name of an image, or the names and shares for a mixed image."""
    if label.ndim == 0:
        return (classes[int(label)],)
    shares, places = label.float().sort(descending=True)
    found = [(float(share), classes[int(place)]) for share, place in zip(shares, places, strict=True)]
    said = [(share, name) for share, name in found if share > LEAST_SHARE][:2]
    return tuple(name if len(said) == 1 else f"{share:.2f} {name}" for share, name in said)


def _how(train: Loader) -> str:
    chosen = train.augmentation
    values = {name: getattr(chosen, name) for name in ("policy", "cutout", "erase", "mixup", "cutmix")}
    crops = ["crop"] if chosen.padding else []
    parts = [
        *crops,
        *(["flip"] if chosen.flip else []),
        *(f"{name} {value}" for name, value in values.items() if value),
    ]
    return f", {', '.join(parts)}" if parts else ""
