"""Files of torch.save that are not what they say: name -> bytes. None may be read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from hostile_pickles import (
    APPEND,
    CODES,
    DICT,
    EMPTY,
    GOOD,
    LIST,
    SETITEM,
    call,
    named,
    number,
    put,
    storage,
    table,
    tensor,
    text,
    tuple_of,
    whole,
)

_BYTES = bytes(16)


@dataclass(frozen=True)
class Part:
    """One entry of a zip file; what differs from the truth is given."""

    data: bytes = b""
    method: int = 0
    flags: int = 0x0808
    local_name: bytes | None = None
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    extra: bytes = b""


def zipped(
    parts: Mapping[str, Part | bytes] | list[tuple[str, Part | bytes]],
    *,
    prefix: bytes = b"",
    comment: bytes = b"",
    zip64: bool = True,
    count: int | None = None,
    table_bytes: int | None = None,
    table_start: int | None = None,
) -> bytes:
    """A zip file of stored entries, 64-byte aligned, as torch writes it."""
    out, central = bytearray(prefix), b""
    for name, part in parts.items() if isinstance(parts, Mapping) else parts:
        part = part if isinstance(part, Part) else Part(part)
        encoded = name.encode()
        local_name = encoded if part.local_name is None else part.local_name
        header, crc = len(out), zlib.crc32(part.data)
        padding = bytes(-(header + 30 + len(local_name)) % 64)
        sizes = (len(part.data), len(part.data))
        out += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 0, part.flags, part.method, 0, 0, crc, *sizes, len(local_name), len(padding)
        )
        out += local_name + padding + part.data
        size = len(part.data) if part.size is None else part.size
        packed = size if part.packed is None else part.packed
        place = header if part.header is None else part.header
        central += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, part.flags, part.method, 0, 0, crc, min(packed, 2**32 - 1),
            min(size, 2**32 - 1), len(encoded), len(part.extra), 0, 0, 0, 0, min(place, 2**32 - 1),
        )  # fmt: skip
        central += encoded + part.extra
    start = len(out) if table_start is None else table_start
    length = len(central) if table_bytes is None else table_bytes
    entries = len(parts) if count is None else count
    end_64 = len(out) + len(central)
    out += central
    if zip64:
        out += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, length, start)
        out += struct.pack("<4sLQL", b"PK\x06\x07", 0, end_64, 1)
    small = (min(entries, 2**16 - 1),) * 2 + (min(length, 2**32 - 1), min(start, 2**32 - 1))
    out += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *small, len(comment)) + comment
    return bytes(out)


def torch_parts(pickle: bytes, **storages: Part | bytes) -> dict[str, Part | bytes]:
    stored = {f"x/data/{key[1:]}": value for key, value in (storages or {"_0": _BYTES}).items()}
    return {"x/data.pkl": pickle, "x/byteorder": b"little", **stored, "x/version": b"3\n"}


def torch_file(pickle: bytes, **storages: Part | bytes) -> bytes:
    """A file of one pickle and its storages, given as _0=..., _1=...; storage 0 has 16 bytes unless it is given."""
    return zipped(torch_parts(pickle, **storages))


def _with(**changes: Part | bytes | None) -> bytes:
    parts = torch_parts(whole(table(a=GOOD)))
    for name, part in changes.items():
        name = f"x/{name.replace('_', '/').replace('/pkl', '.pkl')}"
        if part is None:
            del parts[name]
        else:
            parts[name] = part
    return zipped(parts)


def _one(record: bytes) -> bytes:
    return torch_file(whole(table(a=record)))


_GOOD_PICKLE = whole(table(a=GOOD))
_PARTS = torch_parts(_GOOD_PICKLE)
GOOD_TORCH = torch_file(_GOOD_PICKLE)
_DEFLATED = zlib.compress(_GOOD_PICKLE)[2:-4]
_REBUILD = named("torch._utils", "_rebuild_tensor_v2")
_ZIP64_SIZES = struct.pack("<2H2Q", 1, 16, 2**63, 2**63)
_ZIP64 = struct.pack("<2HQ", 1, 8, 2**63)
_SQUARE = ((2, 2), (2, 1))

BROKEN_TORCH: dict[str, bytes] = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 13400000000\n",
    "a bare pickle": _GOOD_PICKLE,
    "torch's format before 1.6": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + _GOOD_PICKLE,
    **{f"cut at byte {cut}": GOOD_TORCH[:cut] for cut in range(1, len(GOOD_TORCH), 41)},
    "bytes in front": b"MZ" * 32 + GOOD_TORCH,
    "bytes behind": GOOD_TORCH + bytes(8),
    "a comment": zipped(_PARTS, comment=b"hello"),
    "no entries": zipped({}),
    "no pickle": zipped({"x/data/0": _BYTES}),
    "two pickles": zipped({**_PARTS, "y/data.pkl": _GOOD_PICKLE}),
    "pickle twice": zipped([*_PARTS.items(), ("x/data.pkl", _GOOD_PICKLE)]),
    "storage twice": zipped([*_PARTS.items(), ("x/data/0", _BYTES)]),
    "absolute name": zipped({**_PARTS, "/etc/passwd": b""}),
    "name with two dots": zipped({**_PARTS, "x/../../y": b""}),
    "name with a backslash": zipped({**_PARTS, "x\\y": b""}),
    "name with a zero byte": zipped({**_PARTS, "x/data/0\0": b""}),
    "empty name": zipped({**_PARTS, "": b""}),
    "pickle is compressed": _with(data_pkl=Part(_DEFLATED, method=8, size=len(_GOOD_PICKLE), packed=len(_DEFLATED))),
    "storage is compressed": _with(data_0=Part(zlib.compress(_BYTES)[2:-4], method=8, size=16, packed=5)),
    "storage is compressed to its own size": _with(data_0=Part(_BYTES, method=8)),
    "a bomb of 2^63 bytes": _with(data_0=Part(bytes(5), method=8, size=2**32 - 1, packed=5, extra=_ZIP64)),
    "storage is encrypted": _with(data_0=Part(_BYTES, flags=0x0001)),
    "pickle is encrypted": _with(data_pkl=Part(_GOOD_PICKLE, flags=0x0041)),
    "another name in the file": _with(data_0=Part(_BYTES, local_name=b"x/data/1")),
    "no such header": _with(data_0=Part(_BYTES, header=3)),
    "header beyond the file": _with(data_0=Part(_BYTES, header=2**31)),
    "header at 2^63": _with(data_0=Part(_BYTES, header=2**32 - 1, extra=_ZIP64)),
    "zip64 without its field": _with(data_0=Part(_BYTES, header=2**32 - 1)),
    "zip64 with an empty field": _with(data_0=Part(_BYTES, header=2**32 - 1, extra=struct.pack("<2H", 1, 0))),
    "entry beyond the file": _with(data_0=Part(_BYTES, size=2**31)),
    "last entry and tensor beyond the file": zipped(
        {
            "x/data.pkl": whole(table(a=tensor(storage("0", 2**28), (2**14, 2**14), (2**14, 1)))),
            "x/data/0": Part(_BYTES, size=2**30),
        }
    ),
    "entry of 2^63 bytes": _with(data_0=Part(_BYTES, size=2**32 - 1, extra=_ZIP64_SIZES)),
    "entry over the next one": zipped({"x/data/0": Part(_BYTES, size=100), "x/data.pkl": _GOOD_PICKLE}),
    "2^16 - 1 entries": zipped(_PARTS, count=2**16 - 1),
    "2^64 - 1 entries": zipped(_PARTS, count=2**64 - 1),
    "one entry fewer in the count": zipped(_PARTS, count=len(_PARTS) - 1),
    "no entries in the count": zipped(_PARTS, count=0),
    "table of 2^63 bytes": zipped(_PARTS, table_bytes=2**63),
    "table at 2^63": zipped(_PARTS, table_start=2**63),
    "table at 0": zipped(_PARTS, table_start=0),
    "big-endian": _with(byteorder=b"big"),
    "byte order of 1 MB": _with(byteorder=b"little" * 2**18),
    "byte order with a line end": _with(byteorder=b"\nhint: ok"),
    "pickle of 2 MB": torch_file(whole(DICT, text("a"), text("b" * 2**21), SETITEM)),
    "missing storage": _with(data_0=None),
    "storage is too short": torch_file(_GOOD_PICKLE, _0=bytes(12)),
    "storage is too long": torch_file(_GOOD_PICKLE, _0=bytes(20)),
    "storage says more": _one(tensor(storage("0", 8), *_SQUARE)),
    "storage says less": _one(tensor(storage("0", 2), *_SQUARE)),
    "storage of 2^62 items": _one(tensor(storage("0", 2**62), *_SQUARE)),
    "storage of 2^64 items": _one(tensor(storage("0", 2**64), *_SQUARE)),
    "storage of -1 items": _one(tensor(storage("0", -1), *_SQUARE)),
    "storage by another key": _one(tensor(storage("../data.pkl", 4), *_SQUARE)),
    "offset beyond the storage": _one(tensor(storage("0", 4), *_SQUARE, offset=1)),
    "offset of 2^62": _one(tensor(storage("0", 4), *_SQUARE, offset=2**62)),
    "offset of 2^64": _one(tensor(storage("0", 4), *_SQUARE, offset=2**64)),
    "negative offset": _one(tensor(storage("0", 4), *_SQUARE, offset=-1)),
    "transposed": _one(tensor(storage("0", 4), (2, 2), (1, 2))),
    "expanded": _one(tensor(storage("0", 4), (2, 2), (0, 1))),
    "every second item": _one(tensor(storage("0", 4), (2,), (2,))),
    "stride of 2^62": _one(tensor(storage("0", 4), (2, 2), (2**62, 1))),
    "negative stride": _one(tensor(storage("0", 4), (2, 2), (2, -1))),
    "fewer strides than widths": _one(tensor(storage("0", 4), (2, 2), (1,))),
    "100,000 dimensions": torch_file(whole(table(a=tensor(storage("0", 4), (1,) * 10_000, (1,) * 10_000)))),
    "product of 2^64": _one(tensor(storage("0", 4), (2**32, 2**32), (2**32, 1))),
    "product that wraps to 4": _one(tensor(storage("0", 4), (2**39, 2**25, 4), (2**27, 4, 1))),
    "width of 2^63": _one(tensor(storage("0", 4), (2**63,), (1,))),
    "negative width": _one(tensor(storage("0", 4), (-2, -2), (2, 1))),
    "storage of integers": _one(tensor(storage("0", 2, named("torch", "LongStorage")), (2,), (1,))),
    "storage of an unknown type": _one(tensor(storage("0", 4, named("torch", "OddStorage")), *_SQUARE)),
    "one name twice": torch_file(whole(DICT, text("a"), GOOD, SETITEM, text("a"), GOOD, SETITEM)),
    "a number among tensors": torch_file(whole(table(a=GOOD, b=number(3)))),
    "a table of tables": torch_file(whole(table(state_dict=table(a=GOOD)))),
    "a list of tensors": torch_file(whole(LIST, GOOD, APPEND)),
    "a tensor alone": torch_file(whole(GOOD)),
    "numbers for names": torch_file(whole(DICT, number(1), GOOD, SETITEM)),
    "a table for a name": torch_file(whole(DICT, DICT, GOOD, SETITEM)),
    "a table that holds itself": torch_file(whole(DICT, put(0), text("a"), CODES["BINGET"] + b"\0", SETITEM)),
    "a list that holds itself": torch_file(whole(LIST, put(0), CODES["BINGET"] + b"\0", APPEND)),
    "a shape that is a list": _one(call(_REBUILD, storage("0", 4), number(0), LIST, LIST, EMPTY, EMPTY)),
    "a name with line ends": torch_file(whole(DICT, text("a\nhint: ok\n"), tensor(storage("0", 8), *_SQUARE), SETITEM)),
    "a name of half a character": torch_file(whole(DICT, text("\ud800"), tensor(storage("0", 8), *_SQUARE), SETITEM)),
    "an empty pickle": torch_file(b""),
    "a stop alone": torch_file(b"."),
    "a pickle without an end": torch_file(_GOOD_PICKLE[:-1]),
    "a pickle that goes on": torch_file(_GOOD_PICKLE * 2),
    "an unknown operation": torch_file(b"\x80\x02\xff."),
    "an empty stack": torch_file(whole(SETITEM)),
    "a missing mark": torch_file(whole(CODES["TUPLE"])),
    "nothing remembered": torch_file(whole(CODES["BINGET"] + b"\x05")),
    "a text of 2^32 - 1 bytes": torch_file(b"\x80\x02X\xff\xff\xff\xffabc."),
    "a text of 2^63 bytes": torch_file(b"\x80\x02" + CODES["BINUNICODE8"] + struct.pack("<Q", 2**63) + b"abc."),
    "an odd number of items": torch_file(whole(DICT, CODES["MARK"], text("a"), CODES["SETITEMS"])),
    "more operations than tensors need": torch_file(whole(CODES["NONE"] * 2**18)),
    "tensors by a call without arguments": _one(call(_REBUILD)),
    "a persistent id of two": torch_file(whole(table(a=tuple_of(text("storage"), text("0")) + CODES["BINPERSID"]))),
}
