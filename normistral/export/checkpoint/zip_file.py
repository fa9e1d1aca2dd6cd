"""Where the entries of a zip file lie, for files that keep them as they are: stored, not compressed, not encrypted.

Python's `zipfile` would parse the table of contents as well, but believes more of it: it skips what stands before the
archive, takes the last of two entries with one name, and makes objects of a table of any size. Format: PKWARE's
APPNOTE.TXT, sections 4.3 and 4.5.3. It does not know what the entries hold.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

_MAX_TABLE_BYTES = 2**20  # some 10,000 entries; NorMistral-7B would have 300
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_NAME = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*/?")


@dataclass(frozen=True, slots=True)
class Entry:
    """The bytes of one entry in the zip file."""

    start: int
    nbytes: int


def read_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries of a zip file by name.

    Args:
        size: of the whole file, in bytes.

    Raises:
        ValueError, struct.error: the file is truncated or damaged, or an entry is compressed or encrypted.
        OSError: it cannot be read.
    """
    table_start, table_bytes, count = _find_table(file, size)
    if table_bytes > _MAX_TABLE_BYTES:
        raise ValueError(f"a table of contents of {table_bytes} bytes")
    table = _read(file, table_start, table_bytes)
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        signature, _, _, flags, method, _, _, _, packed, unpacked, *lengths, _, _, _, header = _ENTRY.unpack_from(
            table, position
        )
        name_bytes, extra_bytes, comment_bytes = lengths
        position += _ENTRY.size
        if signature != b"PK\x01\x02" or position + sum(lengths) > table_bytes:
            raise ValueError(f"the table of contents is broken at entry {len(entries)}")
        raw_name = table[position : position + name_bytes]
        extra = table[position + name_bytes : position + name_bytes + extra_bytes]
        position += name_bytes + extra_bytes + comment_bytes
        name = raw_name.decode("utf-8")
        if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
            raise ValueError(f"an entry has the name {name[:80]!a}")
        if name in entries:
            raise ValueError(f"two entries have the name {name[:80]!a}")
        if flags & _ENCRYPTED:
            raise ValueError(f"the entry {name[:80]!a} is encrypted")
        unpacked, packed, header = _wide(extra, unpacked, packed, header)
        if method != 0 or packed != unpacked:
            raise ValueError(f"the entry {name[:80]!a} is compressed")
        start = _start_of(file, header, raw_name, table_start)
        if start + unpacked > table_start:
            raise ValueError(f"the entry {name[:80]!a} ends at byte {start + unpacked} of {table_start}")
        entries[name] = Entry(start, unpacked)
    if position != table_bytes:
        raise ValueError(f"the table of contents has {table_bytes - position} bytes too many")
    for before, after in pairwise(sorted(entries.values(), key=lambda entry: entry.start)):
        if before.start + before.nbytes > after.start:
            raise ValueError("entries overlap")
    return entries


def _find_table(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start and size of the table of contents, and how many entries it has. No comment may follow it."""
    end = size - _END.size
    signature, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(_read(file, end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("it does not end like a zip file")
    locator = _read(file, end - _LOCATOR_64.size, _LOCATOR_64.size) if end >= _LOCATOR_64.size else b""
    if locator[:4] == b"PK\x06\x07":  # zip64, as torch always writes it
        end = end - _LOCATOR_64.size - _END_64.size
        _, _, place, _ = _LOCATOR_64.unpack(locator)
        fields = _END_64.unpack(_read(file, end, _END_64.size))
        signature, _, _, _, disk, first_disk, here, count, nbytes, start = fields
        if signature != b"PK\x06\x06" or place != end:
            raise ValueError("its zip64 end is broken")
    if (disk, first_disk, here) != (0, 0, count) or start + nbytes != end:
        raise ValueError("its end does not lead to its table of contents")
    return start, nbytes, count


def _wide(extra: bytes, *values: int) -> list[int]:
    """Replace the values that do not fit in 32 bits by those of the zip64 field, which are in the same order."""
    wide = list(values)
    position, field = 0, b""
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
        position += 4 + length
    for place, value in enumerate(values):
        if value == _FULL_32:
            (wide[place],) = struct.unpack_from("<Q", field)
            field = field[8:]
    return wide


def _start_of(file: BinaryIO, header: int, name: bytes, table_start: int) -> int:
    """Where an entry's bytes begin: behind its local header, whose extra field differs from the table's."""
    if header + _LOCAL.size > table_start:
        raise ValueError(f"an entry begins at byte {header} of {table_start}")
    signature, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack(_read(file, header, _LOCAL.size))
    local_name = _read(file, header + _LOCAL.size, name_bytes)
    if signature != b"PK\x03\x04" or local_name != name or method != 0 or flags & _ENCRYPTED:
        raise ValueError(f"the entry {ascii(name[:80])[1:]} differs from the table of contents")
    start: int = header + _LOCAL.size + name_bytes + extra_bytes
    return start


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    if start < 0:
        raise ValueError("it is too short")
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"it ends before byte {start + count}")
    return data
