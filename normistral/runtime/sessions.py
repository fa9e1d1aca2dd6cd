"""Saves and restores sequences; a file is checked against the model before an engine reads from it.

A session file holds messages, their tokens, and the KV cache that holds them.

    magic     b"normistral session\\n"
    version   4 bytes: the format's
    length    8 bytes: of the header
    header    JSON in UTF-8: a `SessionHeader`
    SHA-256   of all so far
    records   for each tensor: length (4 bytes) and JSON of its name, type and shape; its bytes; a SHA-256
    end       a record of length 0; a SHA-256

Numbers are little-endian. A record's SHA-256 is over the header's, the record's number and the record, so that records
can be neither changed nor left out, swapped or taken from another session. Every length is compared with what the file
still holds before anything is allocated, and a tensor is handed on only when its hash is right. Hashes find damage;
they are no signature. SHA-256 because it is what everything here uses, and processors compute it: 2 GB/s, where
BLAKE2b does 1.4.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar, get_args

import msgspec
import numpy as np

from normistral.errors import UPGRADE, SessionError, UsageError
from normistral.files import atomic_save, explain, open_file, require_place
from normistral.progress import OnBytes, ignore_bytes
from normistral.runtime.engines.base import CacheTensor, describe_arithmetic
from normistral.runtime.engines.settings import ATTENTION, STATEFUL
from normistral.runtime.runner import Runner
from normistral.runtime.sequence import CachedSequence


def session_key(runner: Runner) -> SessionKey:
    """Artifact, engine and settings under which sessions of these weights are good."""
    template, capabilities = runner.manifest.template, runner.capabilities
    return SessionKey(
        artifact_sha256=runner.manifest.sha256,
        template_sha256="" if template is None else hashlib.sha256(template.text.encode()).hexdigest(),
        engine=capabilities.name,
        device=re.split(r"[.:]", capabilities.device)[0],
        numerics=capabilities.kv_cache_key,
    )


def save_sequence(
    runner: Runner,
    sequence: CachedSequence,
    path: str | Path,
    on_bytes: OnBytes,
    *,
    kind: Literal["chat", "prefix"],
    **content: Any,
) -> None:
    """Write a sequence's KV cache with what belongs to it: fields of `SessionHeader`.

    Raises:
        UsageError, NormistralError: as `write_session`.
        EngineError: the engine could not read its cache.
        ClosedError: the model was closed.
    """
    runner.require_open()
    key = session_key(runner)
    with sequence.saving() as saved:
        header = SessionHeader(
            kind=kind,
            key=key,
            artifact=runner.name,
            token_ids=saved.token_ids,
            canonical=saved.canonical,
            computed_by=describe_arithmetic(runner.capabilities),
            **content,
        )
        write_session(Path(path), header, saved.tensors, on_bytes)


def restore_sequence(
    runner: Runner, path: str | Path, kind: Literal["chat", "prefix"], on_bytes: OnBytes
) -> tuple[SessionHeader, CachedSequence]:
    """Read a session that `save_sequence` wrote.

    Raises:
        UsageError, SessionError: as `open_session`; or it is of another kind, artifact, engine or settings.
        EngineError: the engine could not take it over.
        ClosedError: the model was closed.
    """
    path = Path(path)
    with open_session(path, on_bytes) as session:
        session.require(session_key(runner), kind)
        header = session.header
        too_large = max(header.token_ids, default=0) >= runner.manifest.architecture.vocabulary
        if too_large or len(header.token_ids) > runner.context_length:
            raise SessionError(f"{path} holds tokens that {runner.name} cannot have", "begin a new one in another file")
        sequence = runner.create_sequence()
        try:
            if header.token_ids:
                same = header.computed_by == describe_arithmetic(runner.capabilities)
                sequence.restore(header.token_ids, session.tensors(), header.canonical if same else 0)
            else:
                for _ in session.tensors():  # there are none; the file's end is checked all the same
                    raise SessionError(f"{path} is damaged: a cache without tokens", "begin a new one in another file")
        except BaseException:
            sequence.close()
            raise
    return header, sequence


MAGIC = b"normistral session\n"
VERSION = 2
_READABLE = (1, 2)

_MAX_HEADER_BYTES = 64 * 2**20
_MAX_RECORD_HEADER_BYTES = 4096
_DIGEST_BYTES = 32
_SAVE_AGAIN = "it cannot be used any more; begin a new one in another file"

_T = TypeVar("_T")
_Type = Literal["uint8", "uint16", "float16", "float32", "int64"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Artifact, engine and settings of a KV cache; under others it is of no use.

    Attributes:
        artifact_sha256: of the manifest, which holds the hash of every other file.
        template_sha256: of the chat template; "" for none. (Part of the manifest; alone it tells what differs.)
        engine, device: the device without its number.
        numerics: settings that change what is computed.
    """

    artifact_sha256: str
    template_sha256: str
    engine: str
    device: str
    numerics: dict[str, str]


class SavedMessage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation; calls and their results as in `Chat.messages`."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str = ""

    @property
    def as_message(self) -> dict[str, Any]:
        """As `Chat.messages` has it."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        result = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        return {"role": self.role, "content": self.content, **calls, **result}


class SessionHeader(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """All of a session but the tensors.

    Attributes:
        kind: a conversation, or the beginning of many prompts.
        artifact: its name, for messages.
        token_ids: what the KV cache holds.
        canonical: of these, the beginning that a seeded request may use (`CachedSequence`), where `computed_by` is the
            same. Version 1 of the format has neither.
        messages, dropped: as in `Chat`.
        prefix: text or token ids that a prefix was made of.
    """

    kind: Literal["chat", "prefix"]
    key: SessionKey
    artifact: str
    token_ids: list[Count]
    canonical: Count = 0
    computed_by: str = ""
    messages: list[SavedMessage] = []
    dropped: Count = 0
    prefix: str | list[Count] | None = None


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """Header of a tensor."""

    name: str
    type: _Type
    shape: Annotated[list[Count], msgspec.Meta(max_length=8)]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * np.dtype(self.type).itemsize


def write_session(path: Path, header: SessionHeader, tensors: Iterable[CacheTensor], on_bytes: OnBytes) -> None:
    """Write a session through a neighbour that is renamed, with permissions 0600.

    Args:
        on_bytes: called with the number of bytes just written, for a progress bar.

    Raises:
        UsageError: `path` is no name that a file can be written to.
        NormistralError: it cannot be written.
    """
    require_place(path)
    with atomic_save(path) as file:
        text = msgspec.json.encode(header)
        head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(8, "little") + text
        seal = hashlib.sha256(head).digest()
        file.write(head + seal)
        on_bytes(len(head))
        number = 0
        for number, tensor in enumerate(tensors, 1):
            array = np.ascontiguousarray(tensor.array, tensor.array.dtype.newbyteorder("<"))
            kind: Any = array.dtype.name
            assert kind in get_args(_Type)
            record = msgspec.json.encode(_Record(tensor.name, kind, list(array.shape)))
            _write_record(file, seal, number, record, array.reshape(-1).view(np.uint8).data)
            on_bytes(array.nbytes)
        _write_record(file, seal, number + 1, b"", b"")


def _write_record(file: BinaryIO, seal: bytes, number: int, record: bytes, content: memoryview | bytes) -> None:
    start = len(record).to_bytes(4, "little") + record
    digest = _record_digest(seal, number, start)
    digest.update(content)
    file.write(start)
    file.write(content)
    file.write(digest.digest())


class SessionReader:
    """A session file whose header is read and found whole; made by `open_session`."""

    def __init__(self, path: Path, file: BufferedReader, header: SessionHeader, seal: bytes, on_bytes: OnBytes) -> None:
        self.header = header
        self._path, self._file, self._seal, self._on_bytes = path, file, seal, on_bytes

    def require(self, key: SessionKey, kind: str) -> None:
        """Refuse a session of another kind or key.

        Raises:
            UsageError: it is of the other kind.
            SessionError: naming what differs.
        """
        if self.header.kind != kind:
            raise UsageError(f"{self._path} is a saved {self.header.kind}, not a {kind}", "name another file")
        if different := list(_differences(self.header.key, key)):
            old = _attention(self.header.key)
            setting = "" if old == _attention(key) else f" (--set {ATTENTION}={old})"
            raise SessionError(
                f"{self._path} was saved with {' and '.join(different)} ({self.header.artifact})",
                f"run it with what it was saved with{setting}, or begin a new session in another file",
            )

    def tensors(self) -> Iterator[CacheTensor]:
        """The tensors in order, each in one buffer that the next one uses again.

        Raises:
            SessionError: the file is damaged.
        """
        number = 0
        buffer = np.empty(0, np.uint8)
        read = partial(_read_exactly, self._file, self._path)
        while True:
            number += 1
            start = read(4)
            length = int.from_bytes(start, "little")
            if length > _MAX_RECORD_HEADER_BYTES:
                raise _damaged(self._path, f"record {number} is too long")
            start += read(length)
            digest = _record_digest(self._seal, number, start)
            if length == 0:
                if read(_DIGEST_BYTES) != digest.digest() or _bytes_left(self._file):
                    raise _damaged(self._path, "its end does not fit its hash")
                return
            record = _decode(start[4:], _Record, self._path)
            if record.size > _bytes_left(self._file):
                raise _damaged(self._path, "it ends too early")
            if record.size > len(buffer):
                buffer = np.empty(record.size, np.uint8)
            content = buffer[: record.size]
            self._file.readinto(content.data)
            digest.update(content)
            if read(_DIGEST_BYTES) != digest.digest():
                raise _damaged(self._path, f"record {number} does not fit its hash")
            self._on_bytes(record.size)
            yield CacheTensor(record.name, content.view(np.dtype(record.type).newbyteorder("<")).reshape(record.shape))


@contextmanager
def open_session(path: Path, on_bytes: OnBytes = ignore_bytes) -> Iterator[SessionReader]:
    """Read the header of a session; the tensors are read as they are asked for.

    Args:
        on_bytes: called with the number of bytes just read.

    Raises:
        UsageError: there is no such file, or it is no session.
        SessionError: it is damaged, or from a newer version; or it cannot be read.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            yield _open(path, file, on_bytes)
    except FileNotFoundError as exc:
        raise UsageError(f"there is no session {path}", "a chat's or prefix's save() writes one") from exc
    except OSError as exc:
        reason, hint = explain(exc)
        raise SessionError(f"cannot read {path}: {reason}", hint) from exc


def _open(path: Path, file: BufferedReader, on_bytes: OnBytes) -> SessionReader:
    if file.read(len(MAGIC)) != MAGIC:
        raise UsageError(f"{path} is no saved session", "name a file that a session was saved to")
    numbers = _read_exactly(file, path, 12)
    version, length = int.from_bytes(numbers[:4], "little"), int.from_bytes(numbers[4:], "little")
    if version not in _READABLE:
        raise SessionError(
            f"{path} has version {version} of the format; this version of normistral reads up to {VERSION}",
            UPGRADE,
        )
    if length > _MAX_HEADER_BYTES:
        raise _damaged(path, "its header is too long")
    text = _read_exactly(file, path, length)
    seal = hashlib.sha256(MAGIC + numbers + text).digest()
    if _read_exactly(file, path, _DIGEST_BYTES) != seal:
        raise _damaged(path, "its header does not fit its hash")
    return SessionReader(path, file, _decode(text, SessionHeader, path), seal, on_bytes)


def _read_exactly(file: BufferedReader, path: Path, count: int) -> bytes:
    if count > _bytes_left(file):
        raise _damaged(path, "it ends too early")
    return file.read(count)


def _bytes_left(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()


def _decode(text: bytes, kind: type[_T], path: Path) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc


def _record_digest(seal: bytes, number: int, start: bytes) -> Any:
    return hashlib.sha256(seal + number.to_bytes(8, "little") + start)


def _differences(saved: SessionKey, here: SessionKey) -> Iterator[str]:
    if saved.artifact_sha256 != here.artifact_sha256:
        same_template = saved.template_sha256 == here.template_sha256
        yield "another artifact" if same_template else "another artifact and chat template"
    for name in ("engine", "device"):
        if getattr(saved, name) != getattr(here, name):
            yield f"{name} {getattr(saved, name)} instead of {getattr(here, name)}"
    for name in sorted(saved.numerics.keys() | here.numerics.keys()):
        old, new = saved.numerics.get(name), here.numerics.get(name)
        if name == ATTENTION:
            old, new = _attention(saved), _attention(here)
        if old != new:
            yield f"{name} {old} instead of {new}"


def _attention(key: SessionKey) -> str:
    """Which of OpenVINO's attentions a cache is of; the first, the stateful one, has no entry."""
    return key.numerics.get(ATTENTION, STATEFUL)


def _damaged(path: Path, why: str) -> SessionError:
    return SessionError(f"{path} is damaged: {why}", _SAVE_AGAIN)
