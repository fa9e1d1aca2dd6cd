"""What server and worker tell each other: msgpack (msgpack.org), each frame after its length in 4 bytes, big-endian."""

from __future__ import annotations

import asyncio
import struct
from typing import BinaryIO

import msgspec

from normistral.errors import EngineError, NormistralError, UsageError
from normistral.runtime.chunks import Chunk
from normistral.server.backends.base import Job
from normistral.server.backends.settings import BatchSettings

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 64 * 2**20


class Load(msgspec.Struct, tag=True):
    """The first frame: what to load; answered with `Loaded` or `LoadFailed`.

    Attributes:
        manifest_sha256: of the artifact that the server opened; None takes what is there.
    """

    folder: str
    device: str
    exact: bool
    settings: dict[str, str]
    batch: BatchSettings
    manifest_sha256: str | None = None


class Add(msgspec.Struct, tag=True):
    """Take up a job; answered with steps."""

    job: Job


class Cancel(msgspec.Struct, tag=True):
    """Give up a job; not answered."""

    job_id: str


ToWorker = Load | Add | Cancel


class Loaded(msgspec.Struct, tag=True):
    """The model is ready.

    Attributes:
        slots: jobs that may be under way at once.
        engine, device, settings: as its capabilities say.
        batching: how its jobs share it.
        cache_tokens, cache_bytes: what the KV caches of all its jobs hold at most, and take for it.
        arithmetic: as `describe_arithmetic` names it.
    """

    slots: int
    engine: str
    device: str
    settings: dict[str, str]
    batching: str
    cache_tokens: int
    cache_bytes: int
    arithmetic: str = ""


class Failure(msgspec.Struct, tag=True):
    """An error of the package."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: NormistralError) -> Failure:
        """Of an error here."""
        return cls(type(error).__name__, error.message, error.hint)

    def as_error(self) -> NormistralError:
        """The error there: a caller's if it was one, otherwise the engine's."""
        kind = UsageError if self.kind == "UsageError" else EngineError
        return kind(self.message, self.hint)


class LoadFailed(msgspec.Struct, tag=True):
    """The model could not be loaded; the process ends."""

    failure: Failure


class Step(msgspec.Struct, tag=True):
    """The next of a job: a chunk, or the error that ended it."""

    job_id: str
    chunk: Chunk | None
    failure: Failure | None = None


class Beat(msgspec.Struct, tag=True):
    """The process lives; sent twice a second from its start.

    Attributes:
        busy: it computes, rather than waits for jobs.
        steps: of the batch that have ended.
        cpu_s: processor time of all its threads.
    """

    busy: bool
    steps: int
    cpu_s: float


FromWorker = Loaded | LoadFailed | Step | Beat

_encoder = msgspec.msgpack.Encoder()
to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode_frame(frame: ToWorker | FromWorker) -> bytes:
    """A frame with its length."""
    payload = _encoder.encode(frame)
    return _LENGTH.pack(len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's payload; None where the stream ends."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    payload = stream.read(_LENGTH.unpack(header)[0])
    return payload if len(payload) == _LENGTH.unpack(header)[0] else None


async def receive_frame(stream: asyncio.StreamReader) -> bytes | None:
    """As `read_frame`; None also for a length that no worker sends."""
    try:
        length: int = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))[0]
        return await stream.readexactly(length) if length <= _MOST_BYTES else None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
