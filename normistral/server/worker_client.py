"""Server's side of a worker process: starts it, sends jobs, detects its death and starts another."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from normistral.errors import NormistralError
from normistral.processes import main_command, signal_name
from normistral.runtime.chunks import Chunk
from normistral.server.auth import KEYS_VARIABLE
from normistral.server.backends.base import Job
from normistral.server.errors import ApiError, unavailable
from normistral.server.ipc import (
    HEARTBEAT_S,
    Cancel,
    Failure,
    Heartbeat,
    HeartbeatMonitor,
    Load,
    Loaded,
    Step,
    ToWorker,
    encode_message,
    from_worker,
    receive_message,
)

logger = logging.getLogger(__name__)

WORKER_MODULE = "normistral.server.worker"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_DYING_S = 1.0  # from the end of its output until it is ended, so that what is told is what it died of
_STEADY_S = 60.0  # a worker that lived so long did not die of its start

JobOutput = Chunk | NormistralError
Deliver = Callable[[JobOutput], None]


class WorkerClient:
    """One worker, across all its processes.

    Args:
        name: of what it serves, for messages.
        load: what every process is told first.
        module: whose `main` it runs.
        on_change: called when it has become ready, or is no longer.

    Attributes:
        loaded: what the running process said of its model; None while there is none that is ready.
        failure: why the first process since `start` could not load; it is not tried again.
        restarts: processes that died.
        last_end: what the last process since `start` died of.
        pid: of the process that runs now.
    """

    def __init__(
        self, name: str, load: Load, module: str = WORKER_MODULE, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self.loaded: Loaded | None = None
        self.failure: NormistralError | None = None
        self.restarts = 0
        self.last_end: str | None = None
        self.pid: int | None = None
        self._load, self._module, self._on_change = load, module, on_change
        self._jobs: dict[str, Deliver] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._closing = False
        self._ending: str | None = None  # why the server ended the process
        self._trouble: NormistralError | None = None  # why the last process could not load

    def start(self) -> None:
        """Begin to load; `loaded` or `failure` says how it went. After `close` it may be called again."""
        self._closing, self.failure, self._trouble, self.last_end = False, None, None, None
        self._supervision = asyncio.get_running_loop().create_task(self._supervise())

    def explain_absence(self) -> ApiError:
        """503: why no process is ready."""
        if self._trouble is not None:
            return unavailable(
                f"{self.name} could not be loaded again: {self._trouble.message}", self._trouble.hint, code="not_loaded"
            )
        return unavailable(f"{self.name} is not loaded yet", "ask again, or watch /ready", code="loading")

    def add(self, job: Job, deliver: Deliver) -> None:
        """Hand over a job; only while `loaded`.

        Args:
            deliver: called with each chunk, the last of which has a finish reason; or with the error that ended it.
        """
        self._jobs[job.job_id] = deliver
        self._send(job)

    def cancel(self, job_id: str) -> None:
        """Give up a job; nothing more is delivered."""
        if self._jobs.pop(job_id, None) is not None:
            self._send(Cancel(job_id))

    async def close(self) -> None:
        """End the process and forget all jobs."""
        self._closing = True
        if self._supervision is not None:
            self._supervision.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervision
        self._jobs.clear()

    async def _supervise(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await self._run_process()
            finally:
                was_ready, self.loaded, self.pid = self.loaded is not None, None, None
                self._on_change()
            if self.failure is not None:
                return
            self.restarts += 1
            pause = _FIRST_PAUSE_S if was_ready and time.monotonic() - began > _STEADY_S else pause
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _run_process(self) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *main_command(self._module),
                env={name: value for name, value in os.environ.items() if name != KEYS_VARIABLE},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        except OSError as exc:  # no memory, process or descriptor is left for it; there may be later
            self.last_end = f"it could not be started: {exc.strerror}"
            logger.error("%s: no worker process could be started: %s", self.name, exc.strerror)
            return
        self._process, self.pid, self._ending = process, process.pid, None
        assert process.stdout is not None
        monitor = HeartbeatMonitor(process.pid)
        watching = asyncio.create_task(self._watch(process, monitor))
        try:
            self._send(self._load)
            while (payload := await receive_message(process.stdout)) is not None:
                self._take(payload, monitor)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _DYING_S)
        finally:
            watching.cancel()
            self._process = None
            if process.returncode is None:
                self._end(process, "it had nothing more to say")
            code = await process.wait()
            self.last_end = self._ending or _describe(code)
            self._fail_jobs(self.last_end)

    async def _watch(self, process: asyncio.subprocess.Process, monitor: HeartbeatMonitor) -> None:
        """End a process that stands still."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            reason = monitor.tick(loading=self.loaded is None)
            if reason is not None:
                self._end(process, reason)
                return

    def _end(self, process: asyncio.subprocess.Process, reason: str) -> None:
        self._ending = f"by the server: {reason}"
        # `process.kill()` looks first whether the process has ended, and takes its status from asyncio's watcher.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    def _take(self, payload: bytes, monitor: HeartbeatMonitor) -> None:
        match message := from_worker.decode(payload):
            case Heartbeat():
                monitor.hear(message)
            case Loaded():
                self.loaded, self._trouble = message, None
                self._on_change()
            case Failure():
                self._trouble = error = message.as_error()
                if self.last_end is None:
                    self.failure = error
                logger.error("%s could not be loaded: %s", self.name, error.message)
            case Step():
                self._deliver(message.job_id, message.chunk if message.failure is None else message.failure.as_error())

    def _deliver(self, job_id: str, output: JobOutput | None) -> None:
        deliver = self._jobs.get(job_id)
        if deliver is None or output is None:  # it was cancelled while this was under way
            return
        if isinstance(output, NormistralError) or output.finish_reason is not None:
            del self._jobs[job_id]
        deliver(output)

    def _fail_jobs(self, cause: str) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        if self._trouble is None and not self._closing:
            logger.error("%s: its worker process ended (%s); %d answers are lost", self.name, cause, len(jobs))
        for deliver in jobs:
            deliver(unavailable("the model's process ended while it wrote this answer", "ask again", retry_after_s=2))

    def _send(self, message: ToWorker) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(ConnectionError, RuntimeError):  # its death is noticed where it is read
                self._process.stdin.write(encode_message(message))


def _describe(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    name = signal_name(-code)
    return f"{name}: most likely the memory was used up" if -code == signal.SIGKILL else name
