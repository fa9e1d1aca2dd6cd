"""Worker process: holds one model, reads messages from stdin, writes messages to stdout.

It exits at once when stdin closes, whatever it is computing, so that a killed server leaves nothing behind. Output of
the engines goes to stderr. A bug ends the process too: the server answers every job with an error and starts another.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from normistral.errors import NormistralError
from normistral.runtime.chunks import Chunk
from normistral.server.backends.base import BatchBackend, Job, JobUpdate
from normistral.server.backends.create import create_backend
from normistral.server.ipc import (
    Cancel,
    Failure,
    FromWorker,
    HeartbeatSender,
    Load,
    Step,
    ToWorker,
    encode_message,
    read_message,
    to_worker,
)

_PR_SET_PDEATHSIG = 1  # prctl(2)
_BUG = 70  # EX_SOFTWARE of sysexits.h


class _Inbox:
    """Messages that have come in, read by a thread of their own."""

    def __init__(self, stream: BinaryIO) -> None:
        self._arrived: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), name="commands", daemon=True).start()

    def take(self, *, wait: bool = False) -> ToWorker | None:
        """The next one, whenever it comes or if it is there."""
        with suppress(queue.Empty):
            return self._arrived.get(block=wait)
        return None

    def _read(self, stream: BinaryIO) -> None:
        while (payload := read_message(stream)) is not None:
            self._arrived.put(to_worker.decode(payload))
        os._exit(0)  # the server is gone; a forward may take seconds, and threads of the engine do not end by asking


def serve(requests: BinaryIO, stream: BinaryIO) -> None:
    """Load what the first message says, then compute what the others ask for."""
    sending = threading.Lock()

    def send(message: FromWorker) -> None:  # from this thread, and the heartbeat's
        with sending:
            stream.write(encode_message(message))
            stream.flush()

    heartbeat = HeartbeatSender(send)
    inbox = _Inbox(requests)
    load = inbox.take(wait=True)
    assert isinstance(load, Load), "Load comes first"
    try:
        created = create_backend(
            Path(os.fsdecode(load.folder)), load.batch, load.config, load.manifest_sha256, load.prefixes
        )
    except NormistralError as error:
        send(Failure.of(error))
        return
    send(created.told)
    while True:
        _poll(created.batch, inbox, send, heartbeat)
        for progress in created.batch.step():
            send(_as_step(progress))
        heartbeat.steps += 1


def _poll(batch: BatchBackend, inbox: _Inbox, send: Callable[[FromWorker], None], heartbeat: HeartbeatSender) -> None:
    """Hand on what came in; wait for something while there is nothing to compute."""
    heartbeat.busy = not batch.idle
    command = inbox.take(wait=not heartbeat.busy)
    heartbeat.busy = True
    while command is not None:
        match command:
            case Job():
                try:
                    batch.add(command)
                except NormistralError as error:
                    send(_as_step(JobUpdate(command.job_id, error)))
            case Cancel(job_id=job_id):
                batch.cancel(job_id)
        command = inbox.take()


def _as_step(progress: JobUpdate) -> Step:
    output = progress.output
    if isinstance(output, Chunk):
        return Step(progress.job_id, output)
    return Step(progress.job_id, None, Failure.of(output))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve this process's stdin and stdout."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # both are for the server, which ends this process by closing stdin
    outbox = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # an engine's own words are no messages
    try:
        serve(sys.stdin.buffer, outbox)
    except BrokenPipeError:
        os._exit(0)
    except Exception as bug:
        # Where it happened, and not its words: they could quote a prompt.
        where = "".join(traceback.format_tb(bug.__traceback__))
        print(f"{where}worker: this is a bug in normistral: {type(bug).__name__}", file=sys.stderr, flush=True)
        os._exit(_BUG)
    os._exit(0)  # it could not load; the thread that reads commands would be in the way of an orderly end


if __name__ == "__main__":
    main()
