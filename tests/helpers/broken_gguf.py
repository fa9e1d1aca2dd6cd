"""GGUF files that are not what they say: name -> bytes. None may be read."""

from __future__ import annotations

import struct

U8, U32, F32, BOOL, TEXT, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def gguf_text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def meta(key: str, kind: int, value: bytes) -> bytes:
    return gguf_text(key.encode()) + struct.pack("<I", kind) + value


def gguf_array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def gguf_tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    widths = struct.pack(f"<{len(shape)}Q", *shape)
    count = struct.pack("<I", len(shape) if dimensions is None else dimensions)
    return gguf_text(name) + count + widths + struct.pack("<IQ", kind, offset)


def gguf(
    metadata: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if entry_count is None else entry_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


_ARCH = meta("general.architecture", TEXT, gguf_text(b"llama"))
_A = gguf_tensor(b"a", (8,), 0, 0)
_LINE = bytes(32)
GOOD_GGUF = gguf(
    (_ARCH, meta("list", ARRAY, gguf_array(TEXT, 2, gguf_text(b"x") + gguf_text("æ".encode())))),
    (_A, gguf_tensor(b"b", (32, 1), 8, 32)),
    _LINE + bytes(34),
)


def _aligned(value: int, kind: int = U32) -> bytes:
    return meta("general.alignment", kind, struct.pack("<I" if kind == U32 else "<Q", value))


BROKEN_GGUF: dict[str, bytes] = {
    "empty": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + GOOD_GGUF[4:],
    "23 bytes": GOOD_GGUF[:23],
    "version 0": gguf(version=0),
    "version 1": gguf(version=1),
    "version 2^32 - 1": gguf(version=2**32 - 1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^64 - 1 tensors": gguf(tensor_count=2**64 - 1, data=_LINE),
    "2^63 tensors": gguf(tensor_count=2**63, data=_LINE),
    "2^24 tensors": gguf(tensor_count=2**24, data=_LINE),
    "as many tensors as bytes": gguf(tensor_count=60, data=_LINE),
    "2^64 - 1 entries": gguf(entry_count=2**64 - 1, data=_LINE),
    "as many entries as bytes": gguf((_ARCH,), entry_count=60, data=_LINE),
    "key of 2^63 bytes": gguf((gguf_text(b"k", 2**63),)),
    "key of 2^64 - 1 bytes": gguf((gguf_text(b"k", 2**64 - 1),)),
    "key that is not UTF-8": gguf((gguf_text(b"\xff\xfe") + struct.pack("<I", U8) + b"1",)),
    "text of 2^63 bytes": gguf((meta("k", TEXT, gguf_text(b"v", 2**63)),)),
    "text of 2^64 - 1 bytes": gguf((meta("k", TEXT, gguf_text(b"v", 2**64 - 1)),)),
    "text one byte too long": gguf((meta("k", TEXT, gguf_text(b"v", 2)),), alignment=1),
    "unknown kind 13": gguf((meta("k", 13, bytes(8)),)),
    "unknown kind 2^32 - 1": gguf((meta("k", 2**32 - 1, bytes(8)),)),
    "array of arrays": gguf((meta("k", ARRAY, gguf_array(ARRAY, 1, gguf_array(U8, 1, b"1"))),)),
    "arrays 100,000 deep": gguf((meta("k", ARRAY, gguf_array(ARRAY, 1) * 100_000),)),
    "array of an unknown kind": gguf((meta("k", ARRAY, gguf_array(99, 1, bytes(8))),)),
    "array of 2^64 - 1 numbers": gguf((meta("k", ARRAY, gguf_array(U64, 2**64 - 1)),)),
    "array of 2^61 numbers": gguf((meta("k", ARRAY, gguf_array(U64, 2**61)),)),
    "array of 2^24 numbers": gguf((meta("k", ARRAY, gguf_array(U8, 2**24)),)),
    "array a few numbers too long": gguf((meta("k", ARRAY, gguf_array(U64, 40)),), data=_LINE),
    "array a few bytes too long": gguf((meta("k", ARRAY, gguf_array(U8, 60)),), data=_LINE),
    "array of 2^62 texts": gguf((meta("k", ARRAY, gguf_array(TEXT, 2**62)),)),
    "array a few texts too long": gguf((meta("k", ARRAY, gguf_array(TEXT, 40, gguf_text(b"") * 5)),)),
    "one key twice": gguf((_ARCH, _ARCH)),
    "alignment 0": gguf((_aligned(0),), (_A,), _LINE),
    "alignment 3": gguf((_aligned(3),), (gguf_tensor(b"a", (8,), 0, 3),), bytes(64)),
    "alignment 2^31": gguf((_aligned(2**31),), (_A,), _LINE),
    "alignment 2^63": gguf((_aligned(2**63, U64),), (_A,), _LINE),
    "alignment is a text": gguf((meta("general.alignment", TEXT, gguf_text(b"32")),), (_A,), _LINE),
    "alignment is true": gguf((meta("general.alignment", BOOL, b"\x01"),), (_A,), _LINE),
    "alignment is NaN": gguf((meta("general.alignment", F32, struct.pack("<f", float("nan"))),), (_A,), _LINE),
    "alignment is an array": gguf((meta("general.alignment", ARRAY, gguf_array(U8, 1, b"\x20")),), (_A,), _LINE),
    "2^32 - 1 dimensions": gguf((), (gguf_tensor(b"a", (8,), 0, 0, dimensions=2**32 - 1),), _LINE),
    "5 dimensions": gguf((), (gguf_tensor(b"a", (1, 1, 1, 1, 8), 0, 0),), _LINE),
    "0 dimensions": gguf((), (gguf_tensor(b"a", (), 0, 0),), _LINE),
    "width of 2^64 - 1": gguf((), (gguf_tensor(b"a", (2**64 - 1,), 0, 0),), _LINE),
    "product of 2^128": gguf((), (gguf_tensor(b"a", (2**32,) * 4, 0, 0),), _LINE),
    "product that wraps to 8": gguf((), (gguf_tensor(b"a", (2**63, 2, 8), 0, 0),), _LINE),
    "unknown type of tensor": gguf((), (gguf_tensor(b"a", (8,), 99, 0),), _LINE),
    "type of tensor 2^32 - 1": gguf((), (gguf_tensor(b"a", (8,), 2**32 - 1, 0),), _LINE),
    "removed type of tensor": gguf((), (gguf_tensor(b"a", (8,), 4, 0),), _LINE),
    "half a block": gguf((), (gguf_tensor(b"a", (33,), 8, 0),), bytes(68)),
    "offset beyond the file": gguf((), (gguf_tensor(b"a", (8,), 0, 64),), _LINE),
    "offset of 2^63": gguf((), (gguf_tensor(b"a", (8,), 0, 2**63),), _LINE),
    "offset that wraps around": gguf((), (gguf_tensor(b"a", (8,), 0, 2**64 - 32),), _LINE),
    "offset between two lines": gguf((), (gguf_tensor(b"a", (8,), 0, 4),), bytes(64)),
    "overlap": gguf((), (gguf_tensor(b"a", (16,), 0, 0), gguf_tensor(b"b", (8,), 0, 32)), bytes(64)),
    "the same place twice": gguf((), (_A, gguf_tensor(b"b", (8,), 0, 0)), _LINE),
    "one tensor twice": gguf((), (_A, gguf_tensor(b"a", (8,), 0, 32)), bytes(64)),
    "name of 2^63 bytes": gguf((), (gguf_text(b"a", 2**63),), _LINE),
    "name with line ends": gguf((), (gguf_tensor(b"a\nhint: all is well\n", (8,), 0, 3),), bytes(64)),
    "no bytes of the tensor": gguf((), (_A,)),
    **{f"cut at byte {cut}": GOOD_GGUF[:cut] for cut in range(24, len(GOOD_GGUF), 7)},
}
