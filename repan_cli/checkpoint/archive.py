"""Read PyTorch's zip archives, `.pt` and `.pt2`: parse them once, strictly, and write them anew for PyTorch.

Two readers of one zip file may see two different files. One finds the directory by its recorded offset, another by its
place in front of the end record. One takes sizes from the directory, another from the header of each entry. What was
checked through one reader therefore says nothing about another.

So an archive is parsed once, here, and accepted only in the one form that every reader understands alike. Entries are
stored without compression, one after the other, without gaps, from the first byte on. The directory and the end record
follow. The only comment allowed is repan's checksum. PyTorch never sees the bytes of the file: it gets a new archive,
written from the entries that were found here.

Archives above 4 GiB have 64-bit fields as PyTorch and zipfile write them: where the 32-bit field is 0xFFFFFFFF.
"""

from __future__ import annotations

import bisect
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from repan_cli.errors import InputError

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END, END64, LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
DESCRIPTORS = {False: struct.Struct("<4s3I"), True: struct.Struct("<4sI2Q")}
"""The sizes that follow an entry whose header was written before they were known, with 32 and with 64 bits."""

FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
SIZES_FOLLOW, UTF8 = 0x8, 0x800
"""The two flags that an entry may have."""

FOLDER = 0x10
"""The DOS attribute that marks a folder."""

WIDE, PADDING, TIMES, OWNERS = 0x0001, 0x4246, 0x5455, 0x7875
"""The extra fields that an entry may have: 64-bit sizes, PyTorch's alignment, and those that the program zip adds."""

COMMENT = re.compile(rb"repan sha256 [0-9a-f]{64}")
COMMENT_BYTES = 77
MOST_DIRECTORY = 2**22
"""The largest directory in bytes, enough for 50,000 tensors; a larger one may take up to an eighth of its file."""

ROOT = "archive"
"""The folder of all entries in a rewritten archive."""


class _Malformed(Exception):
    """A fault in an archive. Its text completes a sentence that begins with the file's name."""


class Entry(NamedTuple):
    """The position of an entry's bytes in the file, and their CRC-32 (0 if the writer left it out)."""

    start: int
    size: int
    crc: int


class _Listed(NamedTuple):
    """An entry as the directory describes it."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int
    is_wide: bool


class Archive:
    """The entries of an archive by name, without the folder in which PyTorch puts them all."""

    def __init__(self, file: IO[bytes], label: object, fix: str) -> None:
        """Parse an open file.

        Args:
            file: the archive, seekable. It stays open: entries are read from it later.
            label: the file's name, for messages.
            fix: the end of a message that refuses the file: what to do about it.

        Raises InputError if the file is not an archive, or if two readers could understand it differently.
        """
        self._file, self._label, self._fix = file, label, fix
        self._held: dict[str, bytes] = {}
        try:
            self.entries = _parse(file)
        except _Malformed as reason:
            raise InputError(f"{label} {reason}: refused, {fix}") from None
        except (struct.error, UnicodeDecodeError, EOFError):
            raise InputError(f"{label} is damaged, or not a PyTorch archive; use another copy") from None

    def refuse_unless(self, allowed: re.Pattern[str], kind: str) -> None:
        """Raise InputError if the archive has an entry that a file of this kind does not have; name the first one."""
        for name in self.entries:
            if not allowed.fullmatch(name):
                raise InputError(
                    f"{self._label} holds '{printable(name)}', which {kind} does not: refused, {self._fix}"
                )

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry, and keep them: PyTorch gets exactly the bytes that were checked."""
        if name not in self._held:
            entry = self.entries[name]
            content = _bytes_at(self._file, entry.start, entry.size)
            if entry.crc not in (0, zlib.crc32(content)):
                raise InputError(f"{self._label} is damaged: the checksum of {name} differs; use another copy")
            self._held[name] = content
        return self._held[name]

    def empty(self, name: str) -> None:
        """Replace an entry by an empty one in the new archive."""
        self.entries[name], self._held[name] = Entry(0, 0, 0), b""

    def rewritten(self, from_file: re.Pattern[str]) -> IO[bytes]:
        """Return a new archive of the same entries, as a file to read from.

        Entries whose name matches `from_file` (tensors) are read from the file on demand. All others are held in
        memory.
        """
        return io.BufferedReader(_Joined(self._file, list(_pieces(self, from_file))))


def printable(text: str) -> str:
    """Return the start of a text from a file, with `?` for control characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:60])


def _bytes_at(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    content = file.read(size)
    if len(content) != size:
        raise EOFError
    return content


# ---------------------------------------------------------------------------------------------- reading


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Malformed(reason)


def _parse(file: IO[bytes]) -> dict[str, Entry]:
    """Return the entries of an archive. Raises _Malformed, struct.error, UnicodeDecodeError or EOFError."""
    total = file.seek(0, io.SEEK_END)
    count, start, end = _directory_of(file, total)
    _require(end - start <= max(MOST_DIRECTORY, total // 8), "has a directory that would fill the memory")
    place, found = 0, []
    for listed in _listed(_bytes_at(file, start, end - start), count):
        _require(listed.offset == place, "has gaps between its entries, or entries that overlap")
        entry, place = _located(file, listed, start)
        found.append((listed, entry))
    _require(place == start, "has bytes that belong to no entry")
    return _by_name(found)


def _directory_of(file: IO[bytes], total: int) -> tuple[int, int, int]:
    """Return the directory's number of entries, first byte and end."""
    place = _end_record(file, total)
    _, disk, first_disk, here, count, size, start, _ = END.unpack(_bytes_at(file, place, END.size))
    end = place
    fields: tuple[int, ...] = (disk, first_disk, here, count, size, start)
    if place >= LOCATOR.size and _bytes_at(file, place - LOCATOR.size, 4) == b"PK\6\7":
        wide, end = _wide_end(file, place - LOCATOR.size)
        limits = (FULL16,) * 4 + (FULL32,) * 2
        narrow = tuple(min(value, limit) for value, limit in zip(wide, limits, strict=True))
        _require(fields == narrow, "has two end records that disagree")
        fields = wide
    else:
        _require(FULL16 not in fields[:4] and FULL32 not in fields[4:], "lacks its 64-bit end record")
    disk, first_disk, here, count, size, start = fields
    _require(disk == first_disk == 0 and here == count, "is a part of a split archive")
    _require(start + size == end, "has a directory that is not where its end record says")
    return count, start, end


def _end_record(file: IO[bytes], total: int) -> int:
    """Find the end record: at the end of the file, followed by nothing but repan's checksum."""
    for comment in (0, COMMENT_BYTES):
        place = total - comment - END.size
        if place < 0:
            break
        record = _bytes_at(file, place, END.size + comment)
        if record.startswith(b"PK\5\6") and END.unpack(record[: END.size])[-1] == comment:
            _require(
                not comment or bool(COMMENT.fullmatch(record[END.size :])), "has a comment that repan did not write"
            )
            return place
    raise _Malformed("does not end with an archive's end record: it is cut off, or something was added to it")


def _wide_end(file: IO[bytes], place: int) -> tuple[tuple[int, ...], int]:
    """Return the fields of the 64-bit end record in the order of the ordinary one, and its position."""
    _, disk, offset, disks = LOCATOR.unpack(_bytes_at(file, place, LOCATOR.size))
    _require(offset == place - END64.size and (disk, disks) == (0, 1), "has a misplaced 64-bit end record")
    mark, size, _, _, disk, first_disk, here, count, length, start = END64.unpack(_bytes_at(file, offset, END64.size))
    _require((mark, size) == (b"PK\6\6", END64.size - 12), "has an invalid 64-bit end record")
    return (disk, first_disk, here, count, length, start), offset


def _listed(directory: bytes, count: int) -> Iterator[_Listed]:
    place = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, kind, offset = CENTRAL.unpack_from(
            directory, place
        )
        _require(mark == b"PK\1\2", "has a directory that is damaged")
        _require(method == 0 and packed == size, "has compressed entries, which could fill the memory")
        _require(not kind & FOLDER, "has entries that are marked as folders")  # PyTorch does not read the rest
        _require(flags & ~(SIZES_FOLLOW | UTF8) == 0, "has entries that are encrypted or patched")
        place += CENTRAL.size
        name, extra, comment = (directory[place : (place := place + length)] for length in lengths)
        _require(place <= len(directory) and not comment and disk == 0, "has a directory that is damaged")
        size, offset, is_wide = _widened(_fields(extra), size, offset)
        yield _Listed(name, flags, crc, size, offset, is_wide)
    _require(place == len(directory), "has more in its directory than its entries")


def _widened(extra: dict[int, bytes], size: int, offset: int) -> tuple[int, int, bool]:
    """Return an entry's size, its offset, and whether they come from a 64-bit field."""
    expected = 16 * (size == FULL32) + 8 * (offset == FULL32)
    _require(len(extra.get(WIDE, b"")) == expected and (WIDE in extra) == bool(expected), WRONG_WIDE)
    values = [value for (value,) in struct.iter_unpack("<Q", extra.get(WIDE, b""))]
    if size == FULL32:
        size, packed = values.pop(0), values.pop(0)
        _require(size == packed and size >= FULL32, WRONG_WIDE)
    if offset == FULL32:
        offset = values.pop(0)
        _require(offset >= FULL32, WRONG_WIDE)
    return size, offset, bool(expected)


WRONG_WIDE = "has 64-bit sizes that disagree with its 32-bit ones"


def _fields(extra: bytes) -> dict[int, bytes]:
    """Return the extra fields of a header by their numbers."""
    found: dict[int, bytes] = {}
    place = 0
    while place < len(extra):
        number, length = struct.unpack_from("<2H", extra, place)
        content = extra[place + 4 : place + 4 + length]
        _require(len(content) == length and number not in found, "has extra fields that are damaged")
        _require(number in (WIDE, PADDING, TIMES, OWNERS), "has extra fields that PyTorch does not write")
        found[number] = content
        place += 4 + length
    return found


DISAGREE = "has an entry whose own header disagrees with the directory"


def _located(file: IO[bytes], listed: _Listed, end: int) -> tuple[Entry, int]:
    """Return the entry with the position of its bytes, and the position of the next entry."""
    header = LOCAL.unpack(_bytes_at(file, listed.offset, LOCAL.size))
    mark, _, flags, method, _, _, *sums, name_bytes, extra_bytes = header
    names = _bytes_at(file, listed.offset + LOCAL.size, name_bytes + extra_bytes)
    _require((mark, flags, method) == (b"PK\3\4", listed.flags, 0) and names[:name_bytes] == listed.name, DISAGREE)
    sizes_follow = bool(flags & SIZES_FOLLOW)
    narrow = min(listed.size, FULL32)
    _require(sums == [listed.crc, narrow, narrow] or (sizes_follow and not any(sums)), DISAGREE)
    _check_local_extra(_fields(names[name_bytes:]), listed)
    start = listed.offset + LOCAL.size + len(names)
    behind = start + listed.size
    _require(behind <= end, "has entries that are longer than the file")
    if sizes_follow:
        form = DESCRIPTORS[listed.is_wide]
        followed = form.unpack(_bytes_at(file, behind, form.size))
        _require(followed == (b"PK\7\b", listed.crc, listed.size, listed.size), DISAGREE)
        behind += form.size
    return Entry(start, listed.size, listed.crc), behind


def _check_local_extra(extra: dict[int, bytes], listed: _Listed) -> None:
    """Raise _Malformed unless the 64-bit field repeats the size and offset (or 0, if they were not known yet)."""
    wide = extra.get(WIDE, b"")
    _require(len(wide) % 8 == 0 and (listed.is_wide or WIDE not in extra), WRONG_WIDE)
    values = {value for (value,) in struct.iter_unpack("<Q", wide)}
    _require(values <= {0, listed.size, listed.offset}, WRONG_WIDE)
    _require(listed.size < FULL32 or listed.size in values, WRONG_WIDE)


def _by_name(found: list[tuple[_Listed, Entry]]) -> dict[str, Entry]:
    """Return the entries by name, without the one folder that contains them all."""
    names = [listed.name.decode("utf-8" if listed.flags & UTF8 else "ascii").partition("/") for listed, _ in found]
    _require(bool(names), "holds nothing")
    _require(len({root for root, _, _ in names}) == 1, "has entries outside its folder")
    # PyTorch's reader ignores the case of names
    _require(len({name.lower() for _, _, name in names}) == len(names), "has two entries of one name")
    return {name: entry for (_, _, name), (_, entry) in zip(names, found, strict=True)}


# ---------------------------------------------------------------------------------------------- writing anew


Piece = bytes | Entry


def _pieces(archive: Archive, from_file: re.Pattern[str]) -> Iterator[Piece]:
    """Yield the parts of the new archive: bytes, and ranges of the file."""
    place, directory = 0, []
    for name, entry in archive.entries.items():
        header = _local_header(name, entry)
        directory.append(_central_header(name, entry, place))
        yield header
        yield entry if from_file.fullmatch(name) else archive.read(name)
        place += len(header) + entry.size
    yield _closing(b"".join(directory), len(directory), place)


def _local_header(name: str, entry: Entry) -> bytes:
    wide = entry.size >= FULL32
    extra = struct.pack("<2H2Q", WIDE, 16, entry.size, entry.size) if wide else b""
    size, path = min(entry.size, FULL32), f"{ROOT}/{name}".encode()
    return LOCAL.pack(b"PK\3\4", 45, UTF8, 0, 0, 0, entry.crc, size, size, len(path), len(extra)) + path + extra


def _central_header(name: str, entry: Entry, offset: int) -> bytes:
    values = [entry.size, entry.size] if entry.size >= FULL32 else []
    values += [offset] if offset >= FULL32 else []
    extra = struct.pack(f"<2H{len(values)}Q", WIDE, 8 * len(values), *values) if values else b""
    size, path = min(entry.size, FULL32), f"{ROOT}/{name}".encode()
    numbers = (45, 45, UTF8, 0, 0, 0, entry.crc, size, size, len(path), len(extra), 0, 0, 0, 0, min(offset, FULL32))
    return CENTRAL.pack(b"PK\1\2", *numbers) + path + extra


def _closing(directory: bytes, count: int, place: int) -> bytes:
    """Return the directory and both end records."""
    size, few = len(directory), min(count, FULL16)
    wide = END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, count, count, size, place)
    locator = LOCATOR.pack(b"PK\6\7", 0, place + size, 1)
    end = END.pack(b"PK\5\6", 0, 0, few, few, min(size, FULL32), min(place, FULL32), 0)
    return directory + wide + locator + end


class _Joined(io.RawIOBase):
    """Read a sequence of bytes and ranges of a file as if they were one file."""

    def __init__(self, file: IO[bytes], pieces: list[Piece]) -> None:
        self._file, self._pieces, self._place = file, pieces, 0
        self._starts, self._size = [], 0
        for piece in pieces:
            self._starts.append(self._size)
            self._size += len(piece) if isinstance(piece, bytes) else piece.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._place < self._size:
            count = self._fill(view[done:])
            if not count:  # the file became shorter
                break
            done, self._place = done + count, self._place + count
        return done

    def _fill(self, view: memoryview) -> int:
        """Copy from the current piece, at most to its end; return the number of bytes."""
        number = bisect.bisect_right(self._starts, self._place) - 1
        piece, within = self._pieces[number], self._place - self._starts[number]
        if isinstance(piece, bytes):
            part = piece[within : within + len(view)]
            view[: len(part)] = part
            return len(part)
        self._file.seek(piece.start + within)
        part = self._file.read(min(len(view), piece.size - within, 2**24))
        view[: len(part)] = part
        return len(part)
