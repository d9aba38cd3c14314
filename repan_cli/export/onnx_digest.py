"""Compute digests of an `.onnx` file, which tell damage from a change by another program.

A file as repan wrote it ends with a checksum of its bytes. No other program puts anything at that place, so a file that
was saved again does not end with it. In that case the digests of the file's content decide; they do not depend on how
the file is serialized. Neither proves who wrote a file: anybody can compute them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repan_cli.checkpoint.archive import printable
from repan_cli.checkpoint.format import CHECKSUM, DIGITS, sealed, sum_around
from repan_cli.errors import InputError
from repan_cli.system.files import to_json

HEADER, DIGESTS, SEAL = "repan", "repan.digests", "seal"
"""The keys of the metadata that hold the network's description, the digests and the checksum."""

END = b"\x0a\x04" + SEAL.encode()
"""The last bytes of a file: the key of the last entry, after its value. Other programs write the key first."""

METADATA = (14 << 3) | 2
"""The tag of a metadata entry in a serialized model."""


@dataclass(frozen=True)
class Digests:
    """SHA-256 of the parts of a model, and the program that wrote it.

    Attributes:
        graph: of operators, connections, types and shapes, without names of nodes and documentation.
        weights: of the numbers in all tensors.
        header: of the description that repan reads.
        facts: of the other metadata that repan wrote.
        producer: the program that the file names.
    """

    graph: str
    weights: str
    header: str
    facts: str
    producer: str


def serialized(model: Any, entries: Mapping[str, str]) -> bytes:
    """Return the file of a model with these entries as its metadata, its digests, and a checksum at the end."""
    del model.metadata_props[:]
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    digests = to_json({**asdict(digests_of(model, entries)), "keys": list(entries)})
    model.metadata_props.add(key=DIGESTS, value=digests)
    seal = CHECKSUM + b"0" * DIGITS
    entry = b"\x12" + bytes([len(seal)]) + seal + END
    content = model.SerializeToString(deterministic=True) + bytes([METADATA, len(entry)]) + entry
    return sealed(io.BytesIO(content), len(content) - len(END) - DIGITS)


def change_of(path: Path, content: bytes, model: Any) -> str | None:
    """Return how a file differs from what repan wrote; None if it does not differ, or if repan did not write it.

    Raises InputError for a damaged file: its checksum does not match. If another program saved it, it is damaged if it
    has other weights in the same graph, or another description.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if _fits(path, content, earlier=DIGESTS not in metadata) or HEADER not in metadata:
        return None
    by = f"changed since repan wrote it, by {_producer(model, metadata)}"
    if DIGESTS not in metadata:  # by an earlier version, which ended the file with its checksum
        return by
    try:
        told = json.loads(metadata[DIGESTS])
        keys, told = told.pop("keys"), Digests(**told)
        found = digests_of(model, {key: metadata.get(key, "") for key in keys})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: its digests are invalid; use another copy") from None
    if found.header != told.header:
        raise InputError(f"{path} is damaged: its description is not the one that repan wrote; use another copy")
    if found.graph == told.graph and found.weights != told.weights:
        raise InputError(f"{path} is damaged: its graph holds other weights than repan wrote; use another copy")
    if found.graph != told.graph:
        return by
    changed = found.facts != told.facts
    return f"{by}: it describes the preparation of images differently to other programs" if changed else None


def _fits(path: Path, content: bytes, *, earlier: bool) -> bool:
    """Return whether a file ends with a matching checksum. Raises InputError if it ends with one that does not match.

    Its mark, or the bytes after it, show that there is a checksum; either may be damaged. `earlier` looks at the place
    where version 0.1 wrote it.
    """
    for end in (END, b"") if earlier else (END,):
        place = len(content) - len(end) - DIGITS
        marked, ended = place > 0 and content[:place].endswith(CHECKSUM), bool(end) and content.endswith(end)
        if marked or ended:
            whole = marked and content.endswith(end)
            if whole and sum_around(io.BytesIO(content), place) == content[place : place + DIGITS]:
                return True
            raise InputError(f"{path} is damaged: its bytes do not match its checksum; use another copy")
    return False


def _producer(model: Any, metadata: Mapping[str, str]) -> str:
    """Name the program that changed a file: the one it names, or the one that left notes in its metadata."""
    named = _named(model)
    try:
        told = json.loads(metadata.get(DIGESTS, "{}"))
        wrote, known = told.get("producer", named), {*told.get("keys", ()), HEADER, DIGESTS, SEAL}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "another program"
    if named and named != wrote:
        return printable(named)
    notes = [key.partition(".")[0] for key in metadata if key not in known and "." in key]
    return printable(notes[0]) if notes else "another program"


def _named(model: Any) -> str:
    return f"{model.producer_name} {model.producer_version}".strip()


# ---------------------------------------------------------------------------------------------- what a model holds


def digests_of(model: Any, entries: Mapping[str, str]) -> Digests:
    """Return the digests of a model with this metadata of repan's."""
    walk = _Walk()
    walk.model(model)
    facts = {key: value for key, value in entries.items() if key != HEADER}
    return Digests(
        walk.structure.hexdigest(),
        walk.weights.hexdigest(),
        hashlib.sha256(entries.get(HEADER, "").encode()).hexdigest(),
        hashlib.sha256(to_json(facts, sort_keys=True).encode()).hexdigest(),
        _named(model),
    )


class _Walk:
    """Feed the parts of a model into two hashes, in an order that does not depend on its serialization."""

    def __init__(self) -> None:
        self.structure, self.weights = hashlib.sha256(), hashlib.sha256()

    def _note(self, *words: object) -> None:
        self.structure.update(repr(words).encode())

    def model(self, model: Any) -> None:
        self._note(*sorted((each.domain or "ai.onnx", each.version) for each in model.opset_import))
        self._graph(model.graph)
        for function in sorted(model.functions, key=lambda each: (each.domain, each.name)):
            self._note("function", function.domain, function.name, *function.input, *function.output)
            self._note(*function.attribute, *sorted((each.domain, each.version) for each in function.opset_import))
            self._messages(function.attribute_proto)
            self._nodes(function.node)
        self._messages(model.training_info)

    def _graph(self, graph: Any) -> None:
        for value in (*graph.input, "to", *graph.output):
            self._note(value if isinstance(value, str) else (value.name, _serialized(value.type)))
        for tensor in sorted(graph.initializer, key=lambda each: each.name):
            self._tensor(tensor)
        self._messages(graph.sparse_initializer)
        self._nodes(graph.node)

    def _nodes(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            self._note("node", node.domain or "ai.onnx", node.op_type, *node.input, "to", *node.output)
            for given in sorted(node.attribute, key=lambda each: each.name):
                self._attribute(given)

    def _attribute(self, given: Any) -> None:
        self._note(given.name, given.type, given.ref_attr_name, given.f, given.i, given.s)
        self._note(*given.floats, "", *given.ints, "", *given.strings)
        for tensor in (*([given.t] if given.HasField("t") else ()), *given.tensors):
            self._tensor(tensor)
        for graph in (*([given.g] if given.HasField("g") else ()), *given.graphs):
            self._graph(graph)
        self._messages([given.sparse_tensor, *given.sparse_tensors, given.tp, *given.type_protos])

    def _tensor(self, tensor: Any) -> None:
        self._note(tensor.name, tensor.data_type, *tensor.dims)
        self.weights.update(_numbers(tensor))

    def _messages(self, messages: Iterable[Any]) -> None:
        for message in messages:
            self._note(_serialized(message))


def _serialized(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)


def _numbers(tensor: Any) -> bytes:
    """Return the numbers of a tensor as bytes, however it stores them."""
    from onnx import numpy_helper

    if tensor.string_data:
        return b"\0".join(tensor.string_data)
    try:
        return numpy_helper.to_array(tensor).tobytes()
    except Exception:  # its numbers do not fit its shape, or NumPy lacks its type
        return _serialized(tensor)
