"""Accept images in the forms that users have: a tensor, a batch of a loader, or an iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from repan_cli.errors import InputError

KEYS = ("pixel_values", "images", "image", "x")
"""Names under which batches that are mappings hold their images; otherwise the first tensor of images is used."""

WANTED = "give images (N, C, H, W), a batch that holds them, or an iterable of batches such as a DataLoader"

ImagesLike = Tensor | Mapping[str, Any] | Iterable[Any]
"""A tensor (N, C, H, W), a batch that holds one (first, or under a name), or an iterable of these."""


def image_batches(images: ImagesLike) -> Iterator[Tensor]:
    """Yield tensors (N, C, H, W), one per batch, as they arrive.

    The images of a batch are the first element of (images, labels), or an entry of a mapping. Raises InputError for
    anything else.
    """
    whole = _images_of(images)
    if whole is not None:
        yield whole
        return
    if isinstance(images, (str, bytes, Mapping, Tensor)) or not isinstance(images, Iterable):
        raise InputError(f"{_described(images)}: {WANTED}")
    for batch in images:
        found = _images_of(batch)
        if found is None and isinstance(batch, (list, tuple)) and batch and _is_images(batch[0]):
            found = batch[0]
        if found is None:
            raise InputError(f"{_described(batch)} among the batches of images: {WANTED}")
        yield found


def first_batch(images: ImagesLike) -> Tensor:
    """Return the first batch (N, C, H, W). Raises InputError if there is none."""
    for batch in image_batches(images):
        return batch
    raise InputError(f"no images: {WANTED}")


def _images_of(batch: Any) -> Tensor | None:
    """Return the images of a tensor or of one batch; None for anything else.

    A sequence whose every element is images is several batches. A sequence with images first and other things after
    them is one batch.
    """
    if isinstance(batch, Tensor):
        return batch if _is_images(batch) else None
    if isinstance(batch, Mapping):
        named = [batch[key] for key in KEYS if key in batch]
        return next((part for part in [*named, *batch.values()] if _is_images(part)), None)
    if isinstance(batch, (list, tuple)) and batch and _is_images(batch[0]):
        return None if all(map(_is_images, batch)) else batch[0]
    return None


def _is_images(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4 and part.is_floating_point() and len(part) > 0


def _described(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of {str(thing.dtype).removeprefix('torch.')} {tuple(thing.shape)}"
    if isinstance(thing, str):
        return f"'{thing}'"
    return f"a {type(thing).__name__}"
