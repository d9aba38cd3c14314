"""Data sets: one specification each, loaded whole into memory as uint8 images. Adding one takes one `DatasetSpec`;
those that ship with repan are in `known.py`.

What every loader returns is `Raw`: parts named train, val and test, of which a set has train and at least one other.
`load` turns that into a `Dataset` with the validation part split off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from repan_cli.errors import InputError
from repan_cli.registry import Registry

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
LARGEST_RESIDENT = 16 * 2**30


class Images(NamedTuple):
    """Images as uint8 (N, H, W, C) and their class numbers as int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


class Raw(NamedTuple):
    classes: tuple[str, ...]
    parts: dict[str, Images]


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read.

    `load(root, image_size)` reads it; `image_size` None means its own. Mean and std are those of the training images in
    [0, 1]. `flip` is False where a mirrored image is another thing, such as a digit.
    """

    text: str
    load: Callable[[Path, int | None], Raw]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training. `val` is None when nothing was held out."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    train: Images
    val: Images | None
    test: Images
    split_digest: str

    @property
    def image_size(self) -> int:
        return self.train.images.shape[1]

    @property
    def channels(self) -> int:
        return self.train.images.shape[3]

    def part(self, name: str) -> Images:
        """The part called train, val or test. Raises InputError when there is no validation part."""
        images = getattr(self, name)
        if images is None:
            raise InputError(
                f"{self.name} has no validation part: it was trained with data.val_fraction=0; use --split test"
            )
        return images


DATASETS: Registry[DatasetSpec] = Registry("data set")


def load(
    name: str, root: str | Path, *, image_size: int | None = None, val_fraction: float = 0.1, split_seed: int = 0
) -> Dataset:
    """Read a data set and hold out its validation part.

    A folder set with both val and test uses them as they are. Otherwise the one it has is the test set, and
    `val_fraction` of the training set, stratified and drawn by `split_seed` alone, is held out.
    """
    spec = DATASETS[name]
    raw = spec.load(Path(root), image_size)
    parts = {part: _resized(images, image_size) for part, images in raw.parts.items()}
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    digest = ""
    if test is None:
        val, test = None, val
    if val is None and val_fraction > 0:
        held_out = stratified(train.labels, val_fraction, split_seed)
        digest = hashlib.sha256(np.packbits(held_out).tobytes() + train.labels.tobytes()).hexdigest()
        train, val = Images(*(a[~held_out] for a in train)), Images(*(a[held_out] for a in train))
    return Dataset(name, raw.classes, spec.mean, spec.std, spec.flip, train, val, test, digest)


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A mask (N,) that holds out `fraction` of every class, drawn by `seed`: at least one image, and never all."""
    mask = np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[members[:count]] = True
    return mask


# ---------------------------------------------------------------------------------------------- image folders


def load_folders(root: Path, image_size: int | None) -> Raw:
    """`root/train/<class>/*` and `root/val/<class>/*` or `root/test/<class>/*`, as RGB."""
    if not (root / "train").is_dir():
        raise InputError(
            f"no folder {root / 'train'}: expected {root}/train/<class>/* and {root}/test/<class>/* (or val)"
        )
    if not any((root / part).is_dir() for part in ("val", "test")):
        raise InputError(f"neither {root / 'val'} nor {root / 'test'}: without one of them nothing can be reported")
    classes = _class_folders(root / "train")
    files = {part: _list_images(root / part, classes) for part in ("train", "val", "test") if (root / part).is_dir()}
    size = image_size or _own_size(files["train"][0][0])
    return Raw(
        classes, {part: _read_images(*listed, size, crop=image_size is not None) for part, listed in files.items()}
    )


def _class_folders(folder: Path) -> tuple[str, ...]:
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    if len(classes) < 2:
        raise InputError(f"{folder} holds {len(classes)} class folders; at least two are needed")
    return classes


def _list_images(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The image files of a part and their class numbers. Raises InputError unless it has exactly these classes."""
    there = set(_class_folders(folder))
    for name, wrong in (("lacks", set(classes) - there), ("has, unlike the training set,", there - set(classes))):
        if wrong:
            raise InputError(f"{folder} {name} {len(wrong)} of the class folders, such as '{min(wrong)}'")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(f"{folder / name} holds no images ({', '.join(sorted(EXTENSIONS))})")
        paths += files
        labels += [label] * len(files)
    return paths, labels


def _read_images(paths: list[Path], labels: list[int], size: int, *, crop: bool) -> Images:
    if len(paths) * size * size * 3 > LARGEST_RESIDENT:
        raise InputError(f"{len(paths):,} images of {size} pixels do not fit in memory; set a smaller data.image_size")
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        images = np.stack(list(pool.map(lambda path: _read_image(path, size, crop=crop), paths)))
    return Images(images, np.array(labels, dtype=np.int64))


def _own_size(path: Path) -> int:
    image = _open(path)
    if image.width != image.height:
        raise InputError(
            f"{path} is {image.width}x{image.height} pixels: set data.image_size, images are cropped to a square"
        )
    return image.width


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from None


def _read_image(path: Path, size: int, *, crop: bool) -> np.ndarray:
    image = _open(path)
    if not crop and image.size != (size, size):
        raise InputError(
            f"{path} is {image.width}x{image.height} pixels, others are {size}x{size}: set data.image_size"
        )
    return np.asarray(_square(image, size))


def _square(image: Image.Image, size: int) -> Image.Image:
    """Cropped to a square and resized: whole-number reductions average pixels, others are bicubic with antialiasing."""
    if image.size == (size, size):
        return image
    whole = image.width % size == 0 and image.height % size == 0
    return ImageOps.fit(image, (size, size), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC)


def _resized(part: Images, size: int | None) -> Images:
    if size is None or part.images.shape[1:3] == (size, size):
        return part
    channels = part.images.shape[3]
    resized = [np.asarray(_square(Image.fromarray(i.squeeze(-1) if channels == 1 else i), size)) for i in part.images]
    return Images(np.stack(resized).reshape(-1, size, size, channels), part.labels)


DATASETS.register("folder")(
    DatasetSpec(
        "your own images: ROOT/train/<class>/*, ROOT/{val,test}/<class>/*", load_folders, IMAGENET_MEAN, IMAGENET_STD
    )
)
