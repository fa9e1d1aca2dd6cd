"""Read the header of a .gguf file: metadata, and where each tensor lies. It does not know what they mean.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.file_kinds import unreadable
from normistral.export.tensor import shown

_AGAIN = "download or copy the file again"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 2**24


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape [out, in] as torch writes it, ggml's type number, and its bytes' place in the file."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a .gguf file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and tensor table; every length is checked against the file's size.

    Raises:
        CheckpointError: not a whole little-endian GGUF file of version 2 or 3.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24 or file.read(4) != b"GGUF":
                raise unreadable(path, f"{path.name} is not a GGUF file", "give a .gguf file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the file's permissions") from exc
    except (struct.error, ValueError, IndexError, OverflowError, RecursionError) as exc:
        raise CheckpointError(f"{path.name} is truncated or damaged: {exc}", _AGAIN) from exc


class _Reader:
    """Walks the header; raises ValueError or struct.error at the first thing that cannot be."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4

    def read(self) -> GgufFile:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, but 2 and 3 are known")
        tensor_count, entry_count = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"two values of the name {shown(key)}")
            metadata[key] = self._value(self._scalar("<I"))
        table = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment % 8:
            raise ValueError(f"alignment {ascii(alignment)[:40]}")
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                raise ValueError(f"two tensors of the name {shown(name)}")
            if offset % alignment:
                raise ValueError(f"{shown(name)} begins at byte {offset}, no multiple of {alignment}")
            tensors[name] = self._place(name, shape, kind, data_start + offset)
        for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes))):
            if before.start + before.nbytes > after.start:
                raise ValueError("tensors overlap")
        return GgufFile(self.path, metadata, tensors)

    def _place(self, name: str, shape: tuple[int, ...], ggml_type: int, start: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        if not shape or shape[-1] % block or math.prod(shape) > 2**40:
            raise ValueError(f"{shown(name)} has the impossible shape {list(shape)}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > len(self.data):
            raise ValueError(f"{shown(name)} ends at byte {start + nbytes} of {len(self.data)}")
        return GgufTensor(shape, ggml_type, start, nbytes)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if dimensions > 4:
            raise ValueError(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]  # ggml names the fastest one first
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_scalar_format(kind))
        item = self._scalar("<I")
        count = self._count()
        if item == _STRING:
            return [self._string() for _ in range(count)]
        return self._numbers(_scalar_format(item)[1], count)

    def _numbers(self, code: str, count: int) -> array[Any]:
        """An array as it lies in the file: a list would take up to sixteen times its bytes."""
        numbers = array("B" if code == "?" else code)
        end = self.position + count * numbers.itemsize
        if end > len(self.data):
            raise ValueError(f"{count} numbers at byte {self.position} of {len(self.data)}")
        with memoryview(self.data) as data, data[self.position : end] as raw:
            numbers.frombytes(raw)
        self.position = end
        return numbers

    def _count(self) -> int:
        count: int = self._scalar("<Q")
        if count > min(_MAX_ENTRIES, len(self.data)):
            raise ValueError(f"a count of {count} at byte {self.position - 8}")
        return count

    def _string(self) -> str:
        length = self._scalar("<Q")
        end = self.position + length
        if end > len(self.data):
            raise ValueError(f"a string of {length} bytes at byte {self.position} of {len(self.data)}")
        text = self.data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def _scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return value


def _scalar_format(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
