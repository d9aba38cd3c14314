"""Declare settings, and convert the text that people type to their values."""

from __future__ import annotations

import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from repan_cli.registry import did_you_mean
from repan_cli.system.text import at_home

SWITCHES = {"true": "on", "yes": "on", "false": "off", "no": "off"}
"""Other words for the choices on and off."""

Layer = Mapping[str, Any]


def setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    path: bool = False,
    words: Mapping[str, Any] | None = None,
) -> Any:
    """Return a dataclass field with its text and bounds: low <= value, above < value, value <= high.

    The value of a `path` may begin with '~'. `words` stand for values out of bounds.
    """
    metadata = {
        "text": text,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
        "path": path,
        "words": words or {},
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One declared setting: its dotted key, type, default, text and bounds."""

    key: str
    type: Any
    default: Any
    text: str
    choices: tuple[str, ...]
    low: float | None
    above: float | None
    high: float | None
    path: bool
    words: Mapping[str, Any]

    def parse(self, text: Any) -> Any:
        """Return the value that `text` (a string, or a list of them) stands for.

        Raises ValueError with the reason if it has none.
        """
        kind, optional = _optional(self.type)
        if optional and text in ("null", "~", "", "None", None):
            return None
        if typing.get_origin(kind) is tuple:
            return tuple(self._parse_one(typing.get_args(kind)[0], part) for part in _parts(text))
        return self._parse_one(kind, text)

    def shown(self, value: Any) -> Any:
        """Return the word that stands for a value, if there is one; else the value."""
        return next((word for word, meant in self.words.items() if meant == value), value)

    def describe(self) -> dict[str, Any]:
        """Return the setting's declaration for programs."""
        kind, optional = _optional(self.type)
        many = typing.get_args(kind)
        name = f"list of {many[0].__name__}" if many else kind.__name__
        facts = {"text": self.text, "type": f"{name} or null" if optional else name, "default": self.default}
        bounds = {"choices": [*self.choices, *self.words], "low": self.low, "above": self.above, "high": self.high}
        return {**facts, **{name: bound for name, bound in bounds.items() if bound not in (None, [])}}

    def _parse_one(self, kind: type, text: Any) -> Any:
        if not isinstance(text, str):
            raise ValueError(f"expected one value, not {text!r}")
        if text.strip() in self.words:
            return self.words[text.strip()]
        value = _PARSERS[kind](at_home(text.strip()) if self.path else text.strip())
        if "on" in self.choices:
            value = SWITCHES.get(value, value)
        self._check_bounds(value)
        return value

    def _check_bounds(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices) or f"; choose {', '.join(self.choices[:-1])} or {self.choices[-1]}"
            raise ValueError(f"'{value}' is not a choice{hint}")
        for bound, broken, words in (
            (self.low, operator.lt, "at least"),
            (self.above, operator.le, "above"),
            (self.high, operator.gt, "at most"),
        ):
            if bound is not None and broken(value, bound):
                raise ValueError(f"must be {words} {bound:g}, got {value:g}")


def _optional(kind: Any) -> tuple[Any, bool]:
    if isinstance(kind, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


def _parts(text: Any) -> list[Any]:
    """Return the elements of a list: YAML's own, or `[a,b]` or `a,b` as text, also in Python's notation."""
    if isinstance(text, str):
        text = [part.strip(" '\"") for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
        text = [part for part in text if part]
    return text or []


def _parse_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def _parse_int(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():  # nan and inf too
        raise ValueError(f"'{text}' is not a whole number")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not a finite number")
    return number


_PARSERS: dict[type, Callable[[str], Any]] = {bool: _parse_bool, int: _parse_int, float: _parse_float, str: str}


def as_text(value: Any) -> str:
    """Return a value as users type it."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
