"""Header of a .bin file that torch.save wrote, read without torch and without running its pickle.

Such a file is a zip of stored entries: NAME/data.pkl describes the tensors, NAME/data/0, 1, … are their bytes. A pickle
is a program that may call anything. A small interpreter walks it here that knows only the operations that torch.save
writes for a table of tensors, and makes inert records of them: the names in a pickle are compared with the few that
belong there, and never imported or called. Source of the layout: torch/serialization.py, `_save`.

The zip's table of contents is read here as well. Python's `zipfile` accepts more: it skips what stands before the
archive, takes the last of two entries with one name, and makes objects of a table of any size. Format: PKWARE's
APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.files import unreadable
from normistral.export.checkpoint.tensor import Tensor, make_tensor, shown

_MAX_TABLE_BYTES = 2**20  # some 10,000 entries; NorMistral-7B would have 300
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_32 = 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_NAME = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*/?")


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """The bytes of one entry in the zip file."""

    start: int
    nbytes: int


def read_entries(file: BinaryIO, size: int) -> dict[str, ZipEntry]:
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
    entries: dict[str, ZipEntry] = {}
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
        entries[name] = ZipEntry(start, unpacked)
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
    """Start of an entry's bytes: behind its local header, whose extra field differs from the table's."""
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


# NorMistral-7B's pickle has 35 kB and 9,000 operations. An operation makes a few hundred bytes of records at most.
_MAX_PICKLE_BYTES = 2**20
_MAX_OPERATIONS = 2**17
_LARGEST = 2**63
_TABLE = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGE = re.compile(r"torch\.([A-Za-z0-9]+)Storage")
_STORED = {"BFloat16": ("BF16", 2), "Half": ("F16", 2), "Float": ("F32", 4)}
_PUSHES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ALONE = "save the model's state_dict alone"
_DISTRUST = "use a checkpoint that its authors publish as safetensors, and do not load this file with other tools"


@dataclass(frozen=True, slots=True)
class _Global:
    """Name of an object that a pickle would import."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Bytes of the zip entry data/KEY, as `items` numbers of one type."""

    kind: str
    key: str
    items: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: a part of a storage; offset and strides in items."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name; several may share their bytes.

    Raises:
        CheckpointError: it cannot be read, is truncated, damaged or in the format from before torch 1.6, names code, or
            holds more than contiguous tensors of 16- or 32-bit floats.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            try:
                entries = read_entries(file, size)
            except (ValueError, struct.error) as exc:
                reason = exc if isinstance(exc, ValueError) else "its table of contents is cut"
                raise unreadable(
                    path,
                    f"{path.name} is truncated, damaged, or in torch's format from before version 1.6: {reason}",
                    f"{DOWNLOAD_AGAIN}, or save it anew with a current torch",
                ) from exc
            return _read_tensors(path, file, entries)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the file's permissions") from exc


def _read_tensors(path: Path, file: BinaryIO, entries: dict[str, ZipEntry]) -> dict[str, Tensor]:
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(f"{path.name} is a zip file, but not one that torch.save wrote", DOWNLOAD_AGAIN)
    root = pickles[0].removesuffix("data.pkl")
    order = _content(path, file, entries[f"{root}byteorder"], 16) if f"{root}byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(
            f"{path.name} was written with the byte order {order.decode('latin-1')!a}",
            "save it anew on a little-endian machine",
        )
    try:
        state = _interpret(path, _content(path, file, entries[pickles[0]], _MAX_PICKLE_BYTES))
    except (ValueError, IndexError, TypeError) as exc:
        raise CheckpointError(
            f"{path.name} is damaged: its pickle is broken ({ascii(str(exc))[1:-1][:120]})", DOWNLOAD_AGAIN
        ) from exc
    if not isinstance(state, dict) or not all(isinstance(view, _View) for view in state.values()):
        raise CheckpointError(f"{path.name} holds more than tensors by name", _ALONE)
    return {
        name: _place(path, name, view, entries.get(f"{root}data/{view.storage.key}")) for name, view in state.items()
    }


def _content(path: Path, file: BinaryIO, entry: ZipEntry, limit: int) -> bytes:
    if entry.nbytes > limit:
        raise CheckpointError(
            f"{path.name} holds more than tensors: {entry.nbytes} bytes describe them, where {limit} are enough", _ALONE
        )
    file.seek(entry.start)
    return file.read(entry.nbytes)


def _place(path: Path, name: str, view: _View, entry: ZipEntry | None) -> Tensor:
    """Find a tensor's bytes in the file."""
    if entry is None:
        raise CheckpointError(f"{path.name} is damaged: the bytes of {shown(name)} are missing", DOWNLOAD_AGAIN)
    kind, item_bytes = _STORED.get(view.storage.kind, (view.storage.kind, 0))
    tensor = make_tensor(path, name, kind, list(view.shape), entry.start + view.offset * item_bytes)
    if view.storage.items * item_bytes != entry.nbytes or view.offset * item_bytes + tensor.nbytes > entry.nbytes:
        raise CheckpointError(
            f"{path.name} is damaged: {shown(name)} does not fit in the {entry.nbytes} bytes that are there for it",
            DOWNLOAD_AGAIN,
        )
    if not _is_contiguous(view.shape, view.stride):
        raise CheckpointError(
            f"{path.name}: {shown(name)} is stored transposed, cut or repeated: shape {list(view.shape)}, "
            f"stride {list(view.stride)}",
            "save it anew after calling .contiguous() on every tensor",
        )
    return tensor


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether items follow each other row by row; where there is no second item, its distance does not matter."""
    row_major = 1
    for width, step in zip(reversed(shape), reversed(stride), strict=True):
        if width > 1 and step != row_major:
            return math.prod(shape) == 0
        row_major *= width
    return True


def _interpret(path: Path, pickle: bytes) -> object:
    """Interpret the pickle into inert records.

    Raises:
        CheckpointError: it names or does something that tensors do not need. Nothing of it was done.
        ValueError, IndexError, TypeError: it is no pickle that torch.save wrote.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_marked() -> list[Any]:
        start = marks.pop()
        marked = stack[start:]
        del stack[start:]
        return marked

    for count, (operation, argument, position) in enumerate(pickletools.genops(pickle)):
        if count == _MAX_OPERATIONS:
            raise ValueError(f"more than {_MAX_OPERATIONS} operations")
        name = operation.name
        if name in _PUSHES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[_whole(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise ValueError(f"nothing is remembered as {argument}")
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(pop_marked()))
        elif name in _TUPLES:
            width = _TUPLES[name]
            stack[-width:] = [tuple(stack[-width:])]
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(_known_global(path, str(argument).replace(" ", ".", 1)))
        elif name == "BINPERSID":
            stack.append(_storage(path, stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_rebuild(path, stack.pop(), arguments))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(path, stack[-1], [key, value])
        elif name == "SETITEMS":
            pairs = pop_marked()  # before the table is looked for below them
            _set_items(path, stack[-1], pairs)
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else pop_marked()
            if not isinstance(stack[-1], list):
                raise ValueError("a value is appended to what is no list")
            stack[-1].extend(values)
        elif name == "BUILD":  # the attributes of a state_dict: versions of its modules, and nothing to read
            attributes = stack.pop()
            if not isinstance(stack[-1], dict) or not isinstance(attributes, dict):
                raise _refusal(path, "it sets the state of an object")
        elif name == "STOP":
            if len(stack) != 1 or marks or position != len(pickle) - 1:
                raise ValueError("it ends too early")
            return stack[0]
        elif name != "PROTO":
            # What an operation like STACK_GLOBAL would take from the stack.
            strings = ".".join(value for value in stack[-2:] if isinstance(value, str))
            named = f" of {argument}" if argument is not None else f" after {strings}" if strings else ""
            raise _refusal(path, f"its pickle asks for {name}{named}")
    raise ValueError("it has no end")


def _known_global(path: Path, name: str) -> _Global:
    if name not in (_TABLE, _TENSOR, _PARAMETER) and not _STORAGE.fullmatch(name):
        raise _refusal(path, f"its pickle names {name}")
    return _Global(name)


def _rebuild(path: Path, called: object, arguments: object) -> object:
    """The record that stands for the result of a call."""
    if not isinstance(called, _Global) or not isinstance(arguments, tuple):
        raise _refusal(path, "its pickle calls what is no function")
    if called.name == _TABLE and arguments == ():
        return {}
    if called.name == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], _View):
        return arguments[0]
    if called.name == _TENSOR and len(arguments) in (6, 7) and isinstance(arguments[0], _Storage):
        shape, stride = _widths(arguments[2]), _widths(arguments[3])
        if len(shape) != len(stride):
            raise ValueError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
        return _View(arguments[0], _whole(arguments[1]), shape, stride)
    raise _refusal(path, f"its pickle calls {called.name} in a way that torch.save does not")


def _storage(path: Path, identity: object) -> _Storage:
    """A storage by its persistent id: ("storage", type, key, device, number of items)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise _refusal(path, "its pickle asks for an object from outside")
    _, kind, key, device, items = identity
    if not isinstance(kind, _Global) or not isinstance(key, str) or not isinstance(device, str):
        raise _refusal(path, "its pickle asks for a storage that is none")
    match = _STORAGE.fullmatch(kind.name)
    if match is None:
        raise _refusal(path, f"its pickle asks for a storage of the type {kind.name}")
    return _Storage(match[1], key, _whole(items))


def _set_items(path: Path, table: object, pairs: list[Any]) -> None:
    if not isinstance(table, dict):
        raise _refusal(path, "its pickle sets items of an object")
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(name, str):
            raise CheckpointError(f"{path.name} holds more than tensors by name", _ALONE)
        if name in table:
            raise CheckpointError(
                f"{path.name} is damaged: it holds two values of the name {shown(name)}", DOWNLOAD_AGAIN
            )
        table[name] = value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
        raise ValueError("a size, stride or offset is no whole number")
    return value


def _widths(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise ValueError("a shape or stride is no tuple")
    return tuple(_whole(width) for width in value)


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} holds more than tensors: {ascii(reason)[1:-1][:160]}; nothing was run", _DISTRUST
    )
