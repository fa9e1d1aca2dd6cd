"""Generation for one request: its jobs, their output, and server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normistral.errors import NormistralError
from normistral.runtime.chunks import Chunk, Timings
from normistral.server.admission import Admission
from normistral.server.backends.base import Job
from normistral.server.errors import ApiError, as_api_error, bug_error, unavailable
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.worker_client import JobOutput

T = TypeVar("T")
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
Events = AsyncIterator[dict[str, Any]]


class SequenceOutput(NamedTuple):
    """Next chunk of one of the sequences of a request."""

    choice: int
    chunk: Chunk


class Generation:
    """Jobs of one request; `close` has to follow `begin`.

    Args:
        model: name, for the metrics.
        began: `time.monotonic()` when the request came.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        admission: Admission,
        limits: ServerLimits,
        metrics: Metrics,
        model: str,
        began: float,
    ) -> None:
        self._jobs, self._admission, self._limits = jobs, admission, limits
        self._metrics, self._model, self._began = metrics, model, began
        self._index = {job.job_id: index for index, job in enumerate(jobs)}
        self._open: set[str] = set()  # handed in and not ended
        self._started: set[str] = set()
        self._arrived: asyncio.Queue[tuple[int, JobOutput]] = asyncio.Queue()

    def begin(self) -> None:
        """Submit the jobs; raises ApiError as `Admission.submit`."""
        self._admission.submit(self._jobs, self._deliver)
        self._open = set(self._index)

    def close(self) -> None:
        """Cancel unfinished jobs."""
        for job_id in list(self._open):
            self._open.discard(job_id)
            self._admission.cancel(job_id)
            self._metrics.cancelled.labels(self._model).inc()

    async def outputs(self) -> AsyncIterator[SequenceOutput]:
        """All chunks of all sequences, until all have finished.

        Raises:
            ApiError, NormistralError: what ended one of them.
        """
        ended = 0
        deadline = self._began + self._limits.request_s
        while ended < len(self._jobs):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    index, output = await self._arrived.get()
            except TimeoutError:
                raise unavailable(
                    f"the answer took more than {self._limits.request_s:g} s", "ask for less", code="request_timeout"
                ) from None
            if isinstance(output, NormistralError):
                raise output
            if output.finish_reason == "cancelled":
                raise unavailable("the answer was given up", "ask again")
            ended += output.finish_reason is not None
            yield SequenceOutput(index, output)

    def _deliver(self, job_id: str, output: JobOutput) -> None:
        if isinstance(output, Chunk):
            if output.token_id is not None:
                self._metrics.generated_tokens.labels(self._model).inc()
                if job_id not in self._started:
                    self._started.add(job_id)
                    self._metrics.first_token.labels(self._model).observe(time.monotonic() - self._began)
            if output.finish_reason is not None:
                self._open.discard(job_id)
                self._count(output.timings)
        else:
            self._open.discard(job_id)
        if self._arrived.qsize() >= self._limits.backlog:
            self.close()
            output = ApiError(408, "the answer was not read in time", "read it as it comes", code="reader_too_slow")
        self._arrived.put_nowait((self._index[job_id], output))

    def _count(self, timings: Timings) -> None:
        self._metrics.prompt_tokens.labels(self._model).inc(timings.prompt_tokens)
        self._metrics.cached_tokens.labels(self._model).inc(timings.cached_tokens)
        if timings.new_tokens > 1:
            self._metrics.speed.labels(self._model).observe(timings.tokens_per_s)


class ClientLeftError(ApiError):
    """The client has disconnected."""

    def __init__(self) -> None:
        super().__init__(499, "the client left", code="client_left")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Run `work`; cancel it when the client disconnects.

    Raises:
        ClientLeftError: it left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


class Framing(NamedTuple):
    """How events of a stream are written.

    Attributes:
        encode: an event as bytes.
        end: behind the last event of a stream without an error.
        describe: the event of an error.
    """

    media_type: str
    encode: Callable[[dict[str, Any]], bytes]
    end: bytes
    describe: Callable[[ApiError], dict[str, Any]]


def encode_line(event: dict[str, Any]) -> bytes:
    """JSON that is one line for every reader: httpx, which Ollama's package reads with, ends lines as Python does."""
    line = msgspec.json.encode(event)
    for character, escaped in _LINE_ENDS:
        line = line.replace(character, escaped)
    return line


def encode_data(event: dict[str, Any]) -> bytes:
    """A server-sent event (html.spec.whatwg.org, 9.2) without a name."""
    return b"data: " + encode_line(event) + b"\n\n"


def encode_named(event: dict[str, Any]) -> bytes:
    """A server-sent event that is called as its type."""
    return b"event: " + str(event["type"]).encode() + b"\n" + encode_data(event)


OPENAI_CHAT = Framing("text/event-stream", encode_data, b"data: [DONE]\n\n", lambda error: error.document)


class EventStream(Response):
    """Events of an answer while it is written.

    Args:
        events: the first is waited for before anything is sent, so that what fails until then has its own status.
        close: called when it is over, whatever happened.
    """

    def __init__(self, events: Events, close: Callable[[], None], framing: Framing = OPENAI_CHAT) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=framing.media_type)
        del self.headers["content-length"]
        self._events, self._close, self._framing = events, close, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the client disconnects; the protocol closes a stalled connection."""
        try:
            await unless_gone(self._send(send), receive)
        except ClientLeftError:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        framing = self._framing
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def write(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        await write(framing.encode(first))
        try:
            async for event in self._events:
                await write(framing.encode(event))
            if framing.end:
                await write(framing.end)
        except NormistralError as error:
            await write(framing.encode(framing.describe(as_api_error(error))))
        except Exception as bug:  # no answer ends without a reason; the middleware logs it
            await write(framing.encode(framing.describe(bug_error(bug))))
            await send({"type": "http.response.body", "body": b""})
            raise
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
