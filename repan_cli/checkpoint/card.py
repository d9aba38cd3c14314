"""Describe a network in a file (`meta`): the only reader and writer of the description, for every format.

Beside the description, `format.CONTENT` names the other parts of a checkpoint, and `reading.RECORDS` the entries of an
archive.

The description is a closed schema: known keys with values of known types. A file may come from anybody, so everything
else is refused, and an accepted description can name only things that this package knows how to build.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from repan_cli.config.conventions import CROP_MODES, INTERPOLATIONS
from repan_cli.config.renamed import present

MULTI_BRANCH, FUSED, PLAIN = "multi-branch", "fused", "plain"
FORMS = (MULTI_BRANCH, FUSED, PLAIN)
"""The forms of a network: with side branches, merged, or built without any."""

MOST_CHANNELS, LARGEST_IMAGE = 4096, 2**16
CHANGE_KINDS = ("adapt", "expand", "grow", "merge")


class Change(NamedTuple):
    """One place in a network that becomes a block. In a checkpoint it is a list of strings.

    `adapt` makes blocks of timm's own multi-branch module. `expand` makes a block of a convolution and the BN behind
    it; a convolution without BN gets a bias if it has none. `grow` adds side branches to a block that has none. `merge`
    puts one convolution into a module that computes a sum of branches itself, in place of that sum.

    Attributes:
        kind: one of `CHANGE_KINDS`.
        name: the name of the module or convolution in the network.
        norm: for `expand` the name of the BN, if there is one; for `merge` the name of the new convolution in the
            module.
        family: the block family for `expand` and `grow`, else None.
        copies: the number of branches, for families that allow a choice.
    """

    kind: str
    name: str
    norm: str | None = None
    family: str | None = None
    copies: int | None = None


@dataclass(frozen=True)
class Structure:
    """The record of how a network was built; see `models.changes`.

    Attributes:
        changes: the changes that made its blocks.
        left: the reason why each other convolution is not a block, by name.
        native: the `block` family and the `branches` of a network that was created with blocks.
    """

    changes: tuple[Change, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    native: Mapping[str, Any] = field(default_factory=dict)

    def as_meta(self) -> dict[str, Any]:
        """Return the record in plain types."""
        changes = [list(change) for change in self.changes]
        return {"changes": changes, "left": dict(self.left), "native": dict(self.native)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Structure:
        """Read the record from the result of `as_meta`."""
        return cls(tuple(Change(*change) for change in meta["changes"]), meta["left"], meta["native"])


@dataclass(frozen=True)
class RunState:
    """The state that a run resumes from, besides tensors; only in `last.pt`.

    `progress` holds the position, and the plain values of optimizer and scaler. `begun` holds what the recorder had
    noted. `finished` is true if the run began with trained weights, so that it has no baseline.
    """

    progress: Mapping[str, Any]
    begun: Mapping[str, Any]
    finished: bool


@dataclass(frozen=True)
class ModelCard:
    """Everything that a file says about its network. A fact that the file does not give is None.

    `model` is the full name, as `models.resolve` returns it. `block` is the family of its blocks, `form` one of
    `FORMS`. `mean` and `std` have one value per channel, for images in [0, 1]; if `normalizes` is true, the network
    applies them itself. `crop_share` is the part of a resized image's side that is kept. It is given, with `crop_mode`
    and `interpolation`, only if it differs from the usual one.

    `config` holds the run's settings under the names of the version that wrote them; use `settings` to read one.
    `metrics` holds the run's figures at this point, `teachers` the digests of its teachers. `surroundings` lists what
    the last bits may depend on, `float16` what the conversion to that precision lost. `split_digest` identifies the
    images that were held out, `labels_digest` the labels of all images, and `names_digests` the names of the images of
    each part, in order.
    """

    model: str
    block: str | None
    form: str
    structure: Structure
    classes: tuple[str, ...]
    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    split_digest: str = ""
    cycle: int = 0
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    crop_share: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    normalizes: bool | None = None
    precision: str | None = None
    float16: Mapping[str, Any] | None = None
    fused_from: str | None = None
    repan: str | None = None
    command: str | None = None
    labels_digest: str | None = None
    names_digests: Mapping[str, str] | None = None
    surroundings: Mapping[str, Any] | None = None
    teachers: Mapping[str, str] | None = None
    run: RunState | None = None

    @property
    def knows_its_data(self) -> bool:
        """Return whether the card names the data set that the network was trained on."""
        return "data.name" in self.settings

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the run by the names that they have now; `config` and the digest stay as written."""
        return present(self.config)

    def as_meta(self) -> dict[str, Any]:
        """Return the description in plain types, as files hold it."""
        meta = {name: getattr(self, name) for name in WRITTEN}
        meta |= {name: getattr(self, name) for name in IF_KNOWN if getattr(self, name) is not None}
        meta |= {name: list(meta[name]) for name in ("classes", "mean", "std")}
        meta["structure"] = self.structure.as_meta()
        if self.run is not None:
            meta |= {name: getattr(self.run, name) for name in OF_RUNS}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in meta.items()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> ModelCard:
        """Read a description. Raises ValueError, with the reason, for anything that repan does not write."""
        if unknown := sorted(map(str, meta.keys() - FITS.keys())):
            raise ValueError(f"the unknown key '{unknown[0]}'")
        if missing := [name for name in NEEDED if name not in meta]:
            raise ValueError(f"no '{missing[0]}'")
        for name, fits in FITS.items():
            if name in meta and not fits(meta[name]):
                raise ValueError(f"a '{name}' of the wrong kind")
        if 0 < len(meta.keys() & set(OF_RUNS)) < len(OF_RUNS):
            raise ValueError("only a part of what a resume needs")
        if not len(meta["mean"]) == len(meta["std"]) == meta["in_chans"]:
            raise ValueError("a mean or std for another number of channels")
        values = {name: value for name, value in meta.items() if name not in OF_RUNS}
        values |= {name: tuple(meta[name]) for name in ("classes", "mean", "std")}
        values["structure"] = Structure.from_meta(meta["structure"])
        if meta.keys() >= set(OF_RUNS):
            values["run"] = RunState(**{name: meta[name] for name in OF_RUNS})
        return cls(**values)


# ---------------------------------------------------------------------------------------------- the schema

NEEDED = ("model", "block", "form", "structure", "classes", "in_chans", "image_size", "mean", "std")
WRITTEN = (*NEEDED, "config", "split_digest", "cycle", "epoch", "metrics")
IF_KNOWN = (
    *("crop_share", "crop_mode", "interpolation", "normalizes", "precision", "float16", "fused_from", "repan"),
    *("command", "labels_digest", "names_digests", "surroundings", "teachers"),
)
OF_RUNS = ("progress", "begun", "finished")

Fits = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value))


def _settings(value: Any) -> bool:
    """Return whether a value is settings by dotted key, none of them with two values by an old and a new name."""
    if not _mapping(value):
        return False
    try:
        present(value)
    except ValueError:
        return False
    return True


def _optional(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


def _integer(low: int, high: int) -> Fits:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sequence(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value))


def _change(value: Any) -> bool:
    fields = (CHANGE_KINDS.__contains__, _text, _optional(_text), _optional(_text), _optional(_integer(1, 1024)))
    is_list = isinstance(value, (list, tuple)) and len(value) == len(fields) and isinstance(value[0], str)
    return is_list and all(fits(part) for fits, part in zip(fields, value, strict=True))


def _native(value: Any) -> bool:
    parts = {"block": _optional(_text), "branches": _optional(_integer(1, 1024))}
    known = isinstance(value, dict) and (not value or value.keys() == parts.keys())
    return known and all(parts[name](part) for name, part in value.items())


def _structure(value: Any) -> bool:
    parts = {"changes": _sequence(_change), "left": _texts, "native": _native}
    return isinstance(value, dict) and value.keys() == parts.keys() and all(fits(value[k]) for k, fits in parts.items())


def _texts(value: Any) -> bool:
    return _mapping(value) and all(map(_text, value.values()))


FITS: dict[str, Fits] = {
    "model": _text,
    "block": _optional(_text),
    "form": lambda value: isinstance(value, str) and value in FORMS,
    "structure": _structure,
    "classes": _sequence(_text),
    "in_chans": _integer(1, MOST_CHANNELS),
    "image_size": _integer(1, LARGEST_IMAGE),
    "mean": _sequence(_number),
    "std": _sequence(lambda value: _number(value) and value > 0),
    "config": _settings,
    "split_digest": _text,
    "cycle": _integer(0, 2**31),
    "epoch": _optional(_integer(0, 2**31)),
    "metrics": _mapping,
    "crop_share": lambda value: _number(value) and 0 < value <= 1,
    "crop_mode": lambda value: isinstance(value, str) and value in CROP_MODES,
    "interpolation": lambda value: isinstance(value, str) and value in INTERPOLATIONS,
    "normalizes": lambda value: isinstance(value, bool),
    "precision": _text,
    "float16": _mapping,
    "fused_from": _text,
    "repan": _text,
    "command": _text,
    "labels_digest": _text,
    "names_digests": _texts,
    "surroundings": _mapping,
    "teachers": _texts,
    "progress": _mapping,
    "begun": lambda value: _mapping(value) and {"summary", "start", "epoch", "seconds"} <= value.keys(),
    "finished": lambda value: isinstance(value, bool),
}
"""Every key that a description may have, with a check of its value's type."""
