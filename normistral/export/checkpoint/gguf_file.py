"""Read the header of a .gguf file: metadata, and where each tensor lies. It does not know what they mean.

A model may be split into several files, NAME-00001-of-00003.gguf and so on: the first has the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import shlex
import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.files import unreadable
from normistral.export.checkpoint.tensor import shown, some_names

_ORIGINAL = "export the original checkpoint instead of the .gguf file"
_PROSE = ("general.", "quantize.", "split.")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 2**24
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
# Numbers of ggml.h that llama.cpp no longer reads: layouts for single processors, now made when a file is loaded.
_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
_REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape [out, in] as torch writes it, ggml's type number, and its bytes' place in its file."""

    file: Path
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a .gguf file, or of all files of a split one; `path` is the one that was asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """The files of a split model, in order, when the name says that it is one of them; else the file alone."""
    match = _PART.fullmatch(path.name)
    count = int(match[3]) if match else 0
    if match is None or not 1 <= int(match[2]) <= count:
        return (path,)
    return tuple(path.with_name(f"{match[1]}-{part:05}-of-{match[3]}{match[4]}") for part in range(1, count + 1))


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and tensor table, of all files of a split model; every length is checked against the file's size.

    Raises:
        CheckpointError: not a whole little-endian GGUF file of version 2 or 3; or other parts of it are missing.
    """
    parts = gguf_parts(path)
    missing = [part.name for part in parts if not part.is_file()] if len(parts) > 1 else []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"{path.name} is one of {len(parts)} parts of a model; {some_names(missing)} {verb} missing from "
            f"{path.parent}",
            "put all parts into one folder",
        )
    first, *others = [_read_one(part) for part in parts]
    count = first.metadata.get("split.count")
    if isinstance(count, int) and count > 1 and count != len(parts):
        raise CheckpointError(
            f"{path.name} is one of {count} parts of a model, which its name does not say",
            f"give every part its name back, ending in -00001-of-{count:05}.gguf; or join them with llama.cpp's "
            "llama-gguf-split --merge",
        )
    tensors = dict(first.tensors)
    for part in others:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(
                f"{part.path.name} holds {shown(min(twice))}, which another part holds too", DOWNLOAD_AGAIN
            )
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count")
    if len(parts) > 1 and isinstance(total, int) and total != len(tensors):
        raise CheckpointError(
            f"the {len(parts)} parts of {path.name} hold {len(tensors)} tensors, but the first one says {total}",
            "the parts belong to different models: download all of them again",
        )
    return GgufFile(path, first.metadata, tensors)


def _read_one(path: Path) -> GgufFile:
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
        raise CheckpointError(f"{path.name} is truncated or damaged: {exc}", DOWNLOAD_AGAIN) from exc


class _Reader:
    """Walks the header; raises ValueError or struct.error at the first thing that cannot be."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4
        self._errors = "strict"  # of texts that are not UTF-8

    def read(self) -> GgufFile:
        version = self._scalar("<I")
        self._require_version(version)
        tensor_count, entry_count = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"two values of the name {shown(key)}")
            # A description in another encoding does no harm; a token or a name would be another one.
            self._errors = "replace" if key.startswith(_PROSE) and key != "general.architecture" else "strict"
            metadata[key] = self._value(self._scalar("<I"))
        self._errors = "strict"
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

    def _require_version(self, version: int) -> None:
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                f"{self.path.name} is a big-endian GGUF file, for machines like IBM's z",
                f"convert it with: gguf-convert-endian {shlex.quote(self.path.name)} little",
            )
        if version == 1:
            raise CheckpointError(
                f"{self.path.name} is a GGUF file of version 1, of August 2023; 2 and 3 are read", _ORIGINAL
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path.name} is a GGUF file of version {version}; 2 and 3 are known here",
                f"upgrade normistral, or {_ORIGINAL}",
            )

    def _place(self, name: str, shape: tuple[int, ...], ggml_type: int, start: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if ggml_type in _REMOVED:
            raise CheckpointError(
                f"{self.path.name}: {shown(name)} is packed as {_REMOVED[ggml_type]}, which llama.cpp removed",
                "download the same model as Q4_0 or Q4_K_M, or export the original checkpoint",
            )
        if ggml_type not in iter(GGMLQuantizationType):
            raise CheckpointError(
                f"{self.path.name}: {shown(name)} is packed as ggml's type {ggml_type}, which is not known here",
                "export the original checkpoint, or the same model as Q8_0; a newer gguf package may know the type",
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        if not shape or shape[-1] % block or math.prod(shape) > 2**40:
            raise ValueError(f"{shown(name)} has the impossible shape {list(shape)}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > len(self.data):
            raise ValueError(f"{shown(name)} ends at byte {start + nbytes} of {len(self.data)}")
        return GgufTensor(self.path, shape, ggml_type, start, nbytes)

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
        text = self.data[self.position : end].decode("utf-8", self._errors)
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
