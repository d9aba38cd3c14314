"""Read the pickles of data sets: plain containers, numbers, strings and numpy arrays, without running anything.

pickle's own readers call whatever a file names. Not even numpy's own names are safe: a dtype with a forged state makes
an array follow a pointer from the file. This module looks up each instruction of a pickle in one table, and refuses all
others. It never performs a numpy call from the file: it compares the arguments with those that numpy itself writes, and
makes the array from the file's bytes.
"""

from __future__ import annotations

import enum
import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from repan_cli.errors import InputError

KINDS = ("u1", "i2", "i4", "i8", "f4", "f8")
"""The dtypes in the published batches: pixels, labels, and the mean image."""

DTYPE_STATE = (3, None, None, None, -1, -1, 0)
"""The state of a dtype that is a number, except its byte order: no names, no fields, no sub-array, no objects."""

MOST_STEPS = 2_000_000
"""The largest number of instructions, ten times that of the largest published pickle; each may take 100 bytes of
memory.
"""


class _Call(enum.Enum):
    """The functions and classes that a pickle of arrays may name."""

    RECONSTRUCT, ARRAY, DTYPE, SCALAR, ENCODE, FROM_BUFFER = range(6)


NAMES = {
    "numpy ndarray": _Call.ARRAY,
    "numpy dtype": _Call.DTYPE,
    "_codecs encode": _Call.ENCODE,  # Python 3 writes bytes so for Python 2
    **{
        f"numpy.{core}.{module} {name}": call
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "_reconstruct", _Call.RECONSTRUCT),
            ("multiarray", "scalar", _Call.SCALAR),
            ("numeric", "_frombuffer", _Call.FROM_BUFFER),
        )
    },
}


class _RefusedError(ValueError):
    """The pickle holds something that no batch of images has."""


@dataclass
class _Kind:
    """A dtype from a file, one of KINDS."""

    code: str
    order: str = "<"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array from a file. It has no content until its state is read."""

    content: np.ndarray[Any, Any] | None = None


@dataclass
class _Machine:
    """The state on which the instructions of a pickle work."""

    stack: list[Any] = field(default_factory=list)
    outer: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def since_mark(self) -> list[Any]:
        """Remove and return all values that were put on the stack since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items


def read(path: Path) -> dict[Any, Any]:
    """Return the dictionary in a pickle; its numpy arrays may be read-only.

    Strings of Python 2 are decoded as latin-1, as torchvision and the authors of the data sets do.

    Raises InputError, naming the file, if it is not a pickled dictionary, or holds more than plain types and arrays.
    Raises OSError if it cannot be read.
    """
    return parse(path.read_bytes(), path)


def parse(content: bytes, label: object) -> dict[Any, Any]:
    """Return the dictionary in the bytes of a pickle, as `read` does for a file."""
    try:
        found = _run(content)
    except _RefusedError as error:
        raise InputError(
            f"{label} holds {error}, which a batch of images never holds: refused, no code was run; use a copy from "
            "the data set's makers"
        ) from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise InputError(f"{label} is damaged, or not a pickled batch of images ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InputError(f"{label} holds no dictionary, as a batch of images is; use a copy from the data set's makers")
    return {key: value.content if isinstance(value, _Array) else value for key, value in found.items()}


def images_in(batch: dict[Any, Any], label: object, side: int) -> np.ndarray[Any, Any]:
    """Return the images of a batch, uint8 (N, side, side, 3). The file stores each as a row of three planes."""
    rows = batch.get("data")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        raise InputError(
            f"{label} holds no pixels as 8-bit numbers under 'data'; use a copy from the data set's makers"
        )
    if rows.ndim == 0 or rows.size != len(rows) * 3 * side * side:
        raise InputError(f"{label} holds no images of {side}x{side} pixels; use a copy from the data set's makers")
    return np.ascontiguousarray(rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))


def labels_in(batch: dict[Any, Any], key: str, label: object) -> np.ndarray[Any, Any]:
    """Return the class numbers of a batch, int64 (N,), from a list or an array."""
    found = batch.get(key)
    if isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "iu":
        return found.astype(np.int64)
    if not isinstance(found, list) or not all(type(number) is int for number in found):  # no lists of lists
        raise InputError(f"{label} holds no list of numbers under '{key}'; use a copy from the data set's makers")
    return np.array(found, dtype=np.int64)


def texts_in(batch: dict[Any, Any], key: str, label: object) -> list[str]:
    """Return the class names of a data set."""
    found = batch.get(key)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{label} holds no list of texts under '{key}'; use a copy from the data set's makers")
    return found


def _run(content: bytes) -> Any:
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        if count > MOST_STEPS:
            raise _RefusedError("millions of parts")
        if opcode.name not in STEPS:
            raise _RefusedError(f"the pickle instruction {opcode.name}")
        STEPS[opcode.name](machine, argument)
    (result,) = machine.stack
    return result


# ---------------------------------------------------------------------------------------------- arrays


def _name(found: str) -> _Call:
    if found not in NAMES:
        text = "".join(letter if letter.isprintable() else "?" for letter in found[:60])
        raise _RefusedError(f"a call of '{text.replace(' ', '.')}'")
    return NAMES[found]


def _call(function: Any, arguments: Any) -> Any:
    """Return the result of a numpy call, if its arguments are those that numpy writes."""
    if function is _Call.RECONSTRUCT and arguments in ((_Call.ARRAY, (0,), "b"), (_Call.ARRAY, (0,), b"b")):
        return _Array()
    if function is _Call.DTYPE and len(arguments) == 3 and arguments[0] in KINDS and arguments[1:] in ((0, 1), (0, 0)):
        return _Kind(arguments[0])
    if function is _Call.SCALAR and len(arguments) == 2 and isinstance(arguments[0], _Kind):
        return _array(arguments[0], (), arguments[1], "C").item()
    if function is _Call.ENCODE and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
        return arguments[0].encode("latin-1")
    if function is _Call.FROM_BUFFER and len(arguments) == 4 and isinstance(arguments[1], _Kind):
        data, kind, shape, order = arguments
        return _Array(_array(kind, shape, data, order))
    raise _RefusedError("a call that numpy does not write")


def _array(kind: _Kind, shape: Any, data: Any, order: Any) -> np.ndarray[Any, Any]:
    """Return an array that holds exactly these bytes."""
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin-1")
    sized = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not sized or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise _RefusedError("an array that numpy does not write")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _set_state(made: Any, state: Any) -> None:
    if isinstance(made, _Kind) and isinstance(state, tuple) and state[:1] + state[2:] == DTYPE_STATE:
        if state[1] not in ("<", ">", "|"):
            raise _RefusedError("a forged dtype")
        made.order = state[1]
    elif isinstance(made, _Array) and isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Kind):
        _, shape, kind, is_fortran, data = state
        made.content = _array(kind, shape, data, "F" if is_fortran else "C")
    else:
        raise _RefusedError("a forged dtype" if isinstance(made, _Kind) else "an object with a state of its own")


# ---------------------------------------------------------------------------------------------- instructions


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _push_int(machine: _Machine, value: Any) -> None:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise _RefusedError("a number that is too long")
    machine.stack.append(value)


def _memoize(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _mark(machine: _Machine, _: Any) -> None:
    machine.outer.append(machine.stack)
    machine.stack = []


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        items = [machine.stack.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return step


def _append(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    _target(machine, list).append(item)


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    _target(machine, list).extend(items)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill(_target(machine, dict), [key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    _fill(_target(machine, dict), items)


def _target(machine: _Machine, kind: type) -> Any:
    """Return the container on top of the stack."""
    if type(machine.stack[-1]) is not kind:
        raise _RefusedError("an invalid container")
    return machine.stack[-1]


def _fill(target: dict[Any, Any], items: list[Any]) -> None:
    keys = items[::2]
    if not all(isinstance(key, str | bytes) for key in keys):
        raise _RefusedError("keys that are not text")
    target.update(zip(keys, items[1::2], strict=True))


def _new_dict(machine: _Machine, _: Any) -> None:
    made: dict[Any, Any] = {}
    _fill(made, machine.since_mark())
    machine.stack.append(made)


def _name_on_stack(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(module, str) and isinstance(name, str)):  # lists that share parts may be of any length as text
        raise _RefusedError("a call without a name")
    machine.stack.append(_name(f"{module} {name}"))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if type(arguments) is not tuple:
        raise _RefusedError("a call that numpy does not write")
    machine.stack.append(_call(function, arguments))


def _build(machine: _Machine, _: Any) -> None:
    state = machine.stack.pop()
    _set_state(machine.stack[-1], state)


TEXTS = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8"
NUMBERS = "INT LONG BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT"

STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys((*TEXTS.split(), "BYTEARRAY8"), _push),
    **dict.fromkeys(NUMBERS.split(), _push_int),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "MARK": _mark,
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "DICT": _new_dict,
    "LIST": lambda machine, _: _push(machine, machine.since_mark()),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    **{f"TUPLE{count}": _tuple_of(count) for count in (1, 2, 3)},
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": lambda machine, found: machine.stack.append(_name(found)),
    "STACK_GLOBAL": _name_on_stack,
    "REDUCE": _reduce,
    "BUILD": _build,
}
"""Every instruction that a pickle may have, by its name in pickletools."""
