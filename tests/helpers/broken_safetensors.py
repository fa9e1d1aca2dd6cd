"""Safetensors files that are not what they say: name -> bytes. None may be read."""

from __future__ import annotations

import json
import struct
from typing import Any


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The three parts as given; a header that is no bytes is written as JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


EIGHT, SIXTEEN = bytes(8), bytes(16)
GOOD_SAFETENSORS = safetensors({"a": entry(0, 8), "b": entry(8, 16, [4], "BF16")}, SIXTEEN)
_ENTRY = json.dumps(entry(0, 8))

BROKEN_SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "length alone": struct.pack("<Q", 2),
    "length 0": safetensors(b"", length=0),
    "length 1": safetensors(b"{", length=1),
    "length beyond the file": safetensors({"a": entry(0, 8)}, EIGHT, length=10**6),
    "length one too many": safetensors(b"{}", length=3),
    "length 2^32": safetensors(b"{}", length=2**32),
    "length 2^63": safetensors(b"{}", length=2**63),
    "length 2^64 - 1": safetensors(b"{}", length=2**64 - 1),
    "length 2^64 - 8": safetensors(b"{}", length=2**64 - 8),
    "length of 100 MB": safetensors(b"{}" + bytes(100), length=100_000_000),
    "not JSON": safetensors(b"not JSON at all"),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "two documents": safetensors(b"{}{}"),
    "a list": safetensors([]),
    "a number": safetensors(b"12"),
    "null": safetensors(b"null"),
    "lists 100,000 deep": safetensors(b"[" * 100_000),
    "closed lists 100,000 deep": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "objects 100,000 deep": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a shape 100,000 deep": safetensors(b'{"a":{"shape":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
    "a name twice": safetensors(f'{{"a": {_ENTRY}, "a": {_ENTRY}}}'.encode(), EIGHT),
    "a field twice": safetensors(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "entry is a list": safetensors({"a": [1, 2]}),
    "entry is null": safetensors({"a": None}),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "no type": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "offsets are text": safetensors({"a": entry("0", "8")}, EIGHT),
    "offsets are fractions": safetensors({"a": entry(0.0, 8.0)}, EIGHT),
    "offsets are NaN": safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[NaN,NaN]}}', EIGHT),
    "offsets are infinite": safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', EIGHT),
    "offsets are true and false": safetensors({"a": entry(False, True)}, EIGHT),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, EIGHT),
    "begin behind end": safetensors({"a": entry(8, 0)}, EIGHT),
    "negative begin": safetensors({"a": entry(-8, 0)}, EIGHT),
    "end beyond the file": safetensors({"a": entry(0, 16, [4])}, EIGHT),
    "end at 2^63": safetensors({"a": entry(2**63 - 8, 2**63)}, EIGHT),
    "end at 2^64": safetensors({"a": entry(2**64 - 8, 2**64)}, EIGHT),
    "end that wraps around": safetensors({"a": entry(0, 2**64 + 8)}, EIGHT),
    "an offset of 4,000 digits": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,%s]}}' % (b"9" * 4000)
    ),
    "an offset of 100,000 digits": safetensors(b'{"a":{"data_offsets":[0,%s]}}' % (b"9" * 100_000)),
    "overlap": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same place twice": safetensors({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
    "a gap": safetensors({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "a gap in front": safetensors({"a": entry(8, 16)}, SIXTEEN),
    "bytes behind the last": safetensors({"a": entry(0, 8)}, SIXTEEN),
    "bytes that belong to none": safetensors({}, EIGHT),
    "fewer bytes than the shape": safetensors({"a": entry(0, 8, [3])}, EIGHT),
    "more bytes than the shape": safetensors({"a": entry(0, 8, [1])}, EIGHT),
    "product of 2^64": safetensors({"a": entry(0, 8, [2**32, 2**32])}, EIGHT),
    "product that wraps to 2": safetensors({"a": entry(0, 8, [2**33, 2**31, 2])}, EIGHT),
    "width of 2^63": safetensors({"a": entry(0, 8, [2**63])}, EIGHT),
    "width of 10^4000": safetensors(b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,8]}}' % (b"0" * 4000), EIGHT),
    "negative widths": safetensors({"a": entry(0, 8, [-1, -2])}, EIGHT),
    "width is true": safetensors({"a": entry(0, 8, [True, 2])}, EIGHT),
    "width is a fraction": safetensors({"a": entry(0, 8, [2.0])}, EIGHT),
    "shape is a number": safetensors({"a": entry(0, 8, 2)}, EIGHT),
    "shape is an object": safetensors({"a": entry(0, 8, {"0": 2})}, EIGHT),
    "100,000 dimensions": safetensors({"a": entry(0, 4, [1] * 100_000)}, bytes(4)),
    "unknown type": safetensors({"a": entry(0, 8, dtype="F31")}, EIGHT),
    "type of integers": safetensors({"a": entry(0, 8, dtype="I32")}, EIGHT),
    "type is a list": safetensors({"a": entry(0, 8, dtype=["F32"])}, EIGHT),
    "type with a line end": safetensors({"a": entry(0, 8, dtype="F32\nhint: all is well")}, EIGHT),
    "name with line ends": safetensors({"a\nhint: all is well\n": entry(0, 8, [3])}, EIGHT),
    "name of half a character": safetensors(b'{"\\ud800":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', EIGHT),
    "name of 1 MB": safetensors({"a" * 2**20: entry(0, 8, [3])}, EIGHT),
}
