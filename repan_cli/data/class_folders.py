"""Find parts, classes and files in image folders, and ignore other files among them."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import features

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.notices import warn
from repan_cli.system.text import count as count_of
from repan_cli.system.text import quoted

EXTENSIONS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"),
    *({".avif"} if features.check("avif") else ()),
}
"""Endings of image files, in any case."""

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The folder names of each part of a data set, in any case."""

JUNK = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
"""Names, in lower case, of files that systems and programs leave in folders. Names with a leading dot are ignored too.
"""

LIST = "classes.txt"
"""The file next to the parts that gives the order of the classes."""


class Listed(NamedTuple):
    """The images of a part with their class numbers, and a count of other files by ending.

    The paths are text: a million `Path` objects take half a gigabyte.
    """

    paths: list[str]
    labels: npt.NDArray[np.int64]
    others: Counter[str]


def is_junk(name: str) -> bool:
    """Return whether a file or folder is always ignored."""
    return name.startswith(".") or name.lower() in JUNK


def is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not is_junk(path.name)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not is_junk(entry.name))


def _refuse(error: OSError) -> None:
    raise error


def files_below(folder: Path) -> list[Path]:
    """Return all files in and below a folder, sorted, following links, without those that are never data.

    Raises OSError for a folder that cannot be listed: its files would silently be missing.
    """
    found = []
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        known = Path(place).stat()
        if (known.st_dev, known.st_ino) in seen:  # a link to a folder that contains it
            folders.clear()
            continue
        seen.add((known.st_dev, known.st_ino))
        folders[:] = [name for name in folders if not is_junk(name)]
        found += [Path(place) / name for name in names if not is_junk(name)]
    return sorted(found)


# ---------------------------------------------------------------------------------------------- parts


def part_folders(root: Path) -> dict[str, Path]:
    """Return the result of `parts_in`; warn about other folders next to the parts."""
    if named_parts(root) and (strange := [folder.name for folder in _folders(root) if part_of(folder) is None]):
        warn(f"skipped {count_of(len(strange), 'folder')} of {root} that do not belong to a data set: {_some(strange)}")
    return parts_in(root)


def parts_in(root: Path) -> dict[str, Path]:
    """Return the folder of each part of a data set; class folders without parts are the training part.

    Raises InputError if a part exists twice.
    """
    return named_parts(root) or ({"train": root} if is_flat(root) else {})


def named_parts(root: Path) -> dict[str, Path]:
    """Return the folders of a data set whose names are those of parts. Raises InputError if a part exists twice."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        part = part_of(folder)
        if part in found:
            raise InputError(f"{found[part]} and {folder} are the same part of a data set: keep one of them")
        if part is not None:
            found[part] = folder
    return {part: found[part] for part in PARTS if part in found}


def part_of(folder: Path) -> str | None:
    """Return the part of a data set that a folder's name stands for."""
    return next((part for part, names in PARTS.items() if folder.name.lower() in names), None)


def is_flat(root: Path) -> bool:
    """Return whether a folder holds classes without parts: at least two folders of images, none of which has parts."""
    folders = _folders(root)
    return (
        len(folders) > 1
        and part_of(root) is None
        and not named_parts(root)
        and not any(named_parts(folder) for folder in folders)
        and any(_holds_images(folder) for folder in folders[:MOST_ASIDE])
    )


def _is_set(folder: Path) -> bool:
    parts = named_parts(folder)
    return len(_folders(parts["train"])) > 1 if "train" in parts else is_flat(folder)


def _holds_images(folder: Path) -> bool:
    """Return whether there are images among the first files in and below a folder."""
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return any(is_image(file) for file in itertools.islice(files, MOST_FILES))


MOST_FILES, MOST_ASIDE = 1000, 50
"""The number of files and folders that are looked at to see what a folder holds."""


def training_folder(root: Path, parts: dict[str, Path]) -> Path:
    """Return the folder of the training part. Raises InputError if there is none, and names the folder that may be
    meant.
    """
    if "train" in parts:
        return parts["train"]
    if not root.is_dir():
        raise InputError(f"no folder {root}: expected {EXPECTED.format(root)}; --data-root names another place")
    loose = next((entry for entry in _entries(root) if is_image(entry)), None)
    if (meant := _meant(root)) is not None:
        what = f"holds {loose.name} and no class folders" if loose else "is not a data set of image folders"
        raise InputError(f"{root} {what}; did you mean --data-root {quoted(meant)}?")
    if loose:
        raise InputError(f"{root} holds {loose.name} and no class folders: expected {EXPECTED.format(root)}")
    folders = _folders(root)
    if len(folders) == 1 and part_of(folders[0]) is None and _holds_images(folders[0]):
        raise InputError(
            f"{root} holds only one class ('{folders[0].name}'), at least two are needed: expected "
            f"{EXPECTED.format(root)}"
        )
    raise InputError(
        f"no folder {root / 'train'}, nor classes in {root}: expected {EXPECTED.format(root)}; --data-root names "
        "another place"
    )


EXPECTED = "{0}/train/<class>/* and {0}/test/<class>/* (or val), or {0}/<class>/*"


def _meant(root: Path) -> Path | None:
    """Return a data set's folder some levels above or below the given one."""
    top = root.resolve()
    for place in (top, top.parent):  # a part, or a class of one
        if place in named_parts(place.parent).values():
            return _as_typed(place.parent, root)
    if not _folders(root) and is_flat(top.parent):
        return _as_typed(top.parent, root)
    first = _folders(root)[:MOST_ASIDE]
    inside = [*first, *(each for folder in first for each in _folders(folder)[:MOST_ASIDE])]
    return next((folder for folder in inside if _is_set(folder)), None)


def _as_typed(folder: Path, root: Path) -> Path:
    """Return a parent of `root` as a path in the same form: relative if `root` is relative and the path still works."""
    for parent in (root.parent, root.parent.parent):
        if parent.resolve() == folder:
            return parent
    return folder


def _folders(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none if there is no such folder.

    The folder itself tells the kind of its entries: a question for each image would take minutes on a network drive.
    """
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(root / entry.name for entry in entries if not is_junk(entry.name) and entry.is_dir())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# ---------------------------------------------------------------------------------------------- classes


def class_name(folder: Path) -> str:
    """Return a folder's name as a class name, in composed form (NFC). Raises InputError if it is not UTF-8 text."""
    if any("\ud800" <= sign <= "\udfff" for sign in folder.name):
        raise InputError(f"{folder.parent}: the name of the class folder '{folder.name}' is not UTF-8 text: rename it")
    return unicodedata.normalize("NFC", folder.name)


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folder of each class of a part, by class name, sorted. Raises InputError for fewer than two."""
    classes: dict[str, list[Path]] = {}
    for entry in _folders(folder):
        classes.setdefault(class_name(entry), []).append(entry)
    if len(classes) < 2:
        loose = next((entry for entry in _entries(folder) if is_image(entry)), None)
        mend = f": {loose.name} and the others must be in one folder per class" if loose else ""
        raise InputError(f"{folder} holds {count_of(len(classes), 'class folder')}; at least two are needed{mend}")
    return dict(sorted(classes.items()))


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that orders numbers in names by value: 2 before 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in re.split(r"(\d+)", name) if part]


def ordered(classes: Sequence[str], order: str | Sequence[str], root: Path) -> tuple[str, ...]:
    """Return class names in order: 'text', 'natural', the order of a list of names, or that of a file with one name per
    line.

    With 'text', a classes.txt next to the parts takes precedence. Raises InputError if a list does not have exactly
    these names.
    """
    if isinstance(order, str):
        if order == "text" and not (root / LIST).is_file():
            return tuple(sorted(classes))
        if order == "natural":
            return tuple(sorted(classes, key=natural))
        file = root / LIST if order == "text" else Path(order).expanduser()
        return _by_list(classes, names_in(file), str(file))
    return _by_list(classes, order, "the list of classes")


def _by_list(classes: Sequence[str], names: Sequence[str], source: str) -> tuple[str, ...]:
    names = [unicodedata.normalize("NFC", name) for name in names]
    for what, wrong in (("lacks", set(classes) - set(names)), ("has, unlike the data,", set(names) - set(classes))):
        if wrong:
            near = did_you_mean(min(wrong), [*classes, *names])
            raise InputError(f"{source} {what} {len(wrong)} of the classes, such as '{min(wrong)}'{near}")
    if len(set(names)) != len(names):
        raise InputError(f"{source} names a class twice")
    return tuple(names)


def names_in(file: Path) -> list[str]:
    """Return the names in a file with one name per line. Raises InputError if it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read the list of classes {file}: {why}; give text, natural or a file") from None
    return [line.strip() for line in lines if line.strip()]


# ---------------------------------------------------------------------------------------------- images


def first_images(folders: Sequence[Path], count: int) -> list[Path]:
    """Return up to `count` image files of a class. Raises InputError if it has none."""
    there = (path for folder in folders for path in files_below(folder) if is_image(path))
    found = [*itertools.islice(there, count)]
    if not found:
        raise InputError(f"{folders[0]} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def list_images(folder: Path, classes: Sequence[str], *, whole: bool = True) -> Listed:
    """List the image files of a part with their class numbers.

    Raises InputError if the part has a class that is not in `classes` or, with `whole`, lacks one of them.
    """
    there = class_folders(folder)
    lacking, strange = set(classes) - there.keys(), there.keys() - set(classes)
    if lacking and whole:
        raise InputError(f"{folder} lacks {len(lacking)} of the class folders, such as '{min(lacking)}'")
    if strange:
        found = count_of(len(strange), "class folder")
        raise InputError(f"{folder} has {found} that the training set lacks, such as '{min(strange)}'")
    paths: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        files = [path for place in there.get(name, ()) for path in files_below(place)]
        images = [path for path in files if is_image(path)]
        if not images and name in there:
            raise InputError(f"{there[name][0]} holds no images ({', '.join(sorted(EXTENSIONS))})")
        others.update(path.suffix.lower() or "no ending" for path in files if not is_image(path))
        paths += map(str, images)
        labels += [label] * len(images)
    return Listed(paths, np.array(labels, dtype=np.int64), others)


def tell_of_others(root: Path, listed: Iterator[Listed]) -> None:
    """Warn about files that are not readable images, with their number by ending."""
    others = sum((part.others for part in listed), Counter[str]())
    if others:
        named = ", ".join(f"{ending} {number}" for ending, number in others.most_common(5))
        warn(f"{count_of(others.total(), 'file')} of {root} skipped, with unsupported file endings: {named}")
