"""Messages between server and worker process, and the heartbeat that shows that a worker is alive.

A message is msgpack (msgpack.org) after its length in 4 bytes, big-endian. A worker that computes is left alone,
however long a step takes: either the thread beside its engine sends heartbeats with processor time, or, where native
code holds the interpreter, the system reports that time. Time is counted in iterations of the server's own event loop,
so neither a suspended machine nor a starved server kills a worker.
"""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from normistral.errors import EngineError, NormistralError, UsageError
from normistral.runtime.chunks import Chunk
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import BatchSettings, Job
from normistral.server.backends.prefixes import NamedPrefix

_LENGTH = struct.Struct(">I")
_MOST_BYTES = 64 * 2**20
HEARTBEAT_S = 0.5
_SILENT_S = 5.0  # without a beat, and without processor time
_STILL_S = 15.0  # of one step, without processor time
_HELD_S = 120.0  # without a beat: native code may hold the interpreter while it compiles
_STEP_S = 900.0  # of one step, whatever it does
_LOADING = 12  # times as long for reading weights from a slow disk
_WORKING_SHARE = 0.02  # of a processor; a beat takes a hundredth of that


class Load(msgspec.Struct, tag=True):
    """First message: the model to load. Reply: `Loaded`, or the `Failure` with which the process ends.

    Attributes:
        folder: of the artifact, as bytes: its name need not be UTF-8.
        manifest_sha256: of the artifact that the server opened; None takes what is there.
        prefixes: that it has to have in its KV cache before it is ready.
    """

    folder: bytes
    config: EngineConfig
    batch: BatchSettings
    manifest_sha256: str | None = None
    prefixes: list[NamedPrefix] = []


class Cancel(msgspec.Struct, tag=True):
    """Cancel a job. No reply."""

    job_id: str


ToWorker = Load | Job | Cancel  # replies to a job: `Step`


class Loaded(msgspec.Struct, tag=True):
    """The model is ready.

    Attributes:
        slots: jobs that may be under way at once.
        engine, device, settings: as its capabilities say.
        batching: how its jobs share it.
        cache_tokens, cache_bytes: what the KV caches of all its jobs hold at most, and take for it.
        arithmetic: as `describe_arithmetic` names it.
        prefixes: what there is to say of each prefix.
    """

    slots: int
    engine: str
    device: str
    settings: dict[str, str]
    batching: str
    cache_tokens: int
    cache_bytes: int
    arithmetic: str = ""
    prefixes: list[str] = []


class Failure(msgspec.Struct, tag=True):
    """Error of the package, serialized."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: NormistralError) -> Failure:
        """Serialize an error."""
        return cls(type(error).__name__, error.message, error.hint)

    def as_error(self) -> NormistralError:
        """UsageError if it was one, otherwise EngineError."""
        kind = UsageError if self.kind == "UsageError" else EngineError
        return kind(self.message, self.hint)


class Step(msgspec.Struct, tag=True):
    """Next chunk of a job, or the error that ended it."""

    job_id: str
    chunk: Chunk | None
    failure: Failure | None = None


class Heartbeat(msgspec.Struct, tag=True):
    """The process lives; sent twice a second from its start.

    Attributes:
        busy: it computes, rather than waits for jobs.
        steps: of the batch that have ended.
        cpu_s: processor time of all its threads.
    """

    busy: bool
    steps: int
    cpu_s: float


FromWorker = Loaded | Failure | Step | Heartbeat

_encoder = msgspec.msgpack.Encoder()
to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode_message(message: ToWorker | FromWorker) -> bytes:
    """Encode a message with its length."""
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


def read_message(stream: BinaryIO) -> bytes | None:
    """Payload of the next message; None at the end of the stream."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    payload = stream.read(_LENGTH.unpack(header)[0])
    return payload if len(payload) == _LENGTH.unpack(header)[0] else None


async def receive_message(stream: asyncio.StreamReader) -> bytes | None:
    """As `read_message`; None also for a length over 64 MiB."""
    try:
        length: int = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))[0]
        return await stream.readexactly(length) if length <= _MOST_BYTES else None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class HeartbeatSender:
    """Worker side: thread that sends `Heartbeat` twice a second.

    Args:
        send: may be called from any thread.

    Attributes:
        busy: a step is being computed.
        steps: that have ended.
    """

    def __init__(self, send: Callable[[Heartbeat], None]) -> None:
        self.busy, self.steps = True, 0
        self._send = send
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._send(Heartbeat(self.busy, self.steps, time.process_time()))
            except OSError:  # the server is gone
                return
            time.sleep(HEARTBEAT_S)


class HeartbeatMonitor:
    """Server side, for one process. Call `tick` every `HEARTBEAT_S`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = Heartbeat(True, 0, 0.0)
        self._heard = False
        self._silent = self._held = self._still = self._same = 0  # ticks
        self._cpu_s = 0.0

    def hear(self, beat: Heartbeat) -> None:
        """Record a heartbeat."""
        self._heard = True
        moved = not beat.busy or beat.steps != self._last.steps
        worked = beat.cpu_s - self._last.cpu_s > _WORKING_SHARE * HEARTBEAT_S
        self._still = 0 if moved or worked else self._still + 1
        self._same = 0 if moved else self._same + 1
        self._last = beat

    def tick(self, *, loading: bool) -> str | None:
        """Reason to kill the process; None while it is alive."""
        cpu_s = _processor_seconds(self._pid)
        worked = cpu_s is None or cpu_s - self._cpu_s > _WORKING_SHARE * HEARTBEAT_S
        self._cpu_s = cpu_s or 0.0
        self._held = 0 if self._heard else self._held + 1
        self._silent = 0 if self._heard or worked else self._silent + 1
        self._heard = False
        times = _LOADING if loading else 1
        for ticks, most_s, what in (
            (self._silent, _SILENT_S, "it stood still"),
            (self._held, _HELD_S, "it gave no sign of life"),
            (self._still, _STILL_S, "its engine stood still"),
            (self._same, _STEP_S, "one step did not end"),
        ):
            if ticks * HEARTBEAT_S >= times * most_s:
                return f"{what} for {times * most_s:g} s"
        return None


def _processor_seconds(pid: int) -> float | None:
    """User and system time of a process and all its threads (proc(5)); None where it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
