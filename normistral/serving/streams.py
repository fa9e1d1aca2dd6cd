"""Answers whose reader may leave, read slowly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normistral.errors import NormistralError
from normistral.serving.errors import ApiError, as_api_error

T = TypeVar("T")
Events = AsyncIterator[dict[str, Any]]

_DONE = b"data: [DONE]\n\n"


class ClientLeftError(ApiError):
    """Nobody is there any more who could read an answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client left", code="client_left")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves.

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


class EventStream(Response):
    """Server-sent events (html.spec.whatwg.org, 9.2), as OpenAI writes them: each a line of JSON, the last [DONE].

    Args:
        events: the first is waited for before anything is sent, so that what fails until then has its own status.
        stall_s: a reader that takes nothing for so long is cut off.
        close: called when it is over, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, stall_s: float, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._stall_s, self._close = events, stall_s, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(self._send(scope, send), receive)
        except ClientLeftError:
            pass
        finally:
            self._close()

    async def _send(self, scope: Scope, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        write = _Writer(send, self._stall_s)
        try:
            await write(_event(first))
            try:
                async for event in self._events:
                    await write(_event(event))
                await write(_DONE)
            except NormistralError as error:
                await write(_event(as_api_error(error).document))
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:  # closing would wait for a reader who does not read
            scope["state"].get("abort", lambda: None)()


class _Writer:
    """Sends pieces of a body, none of which may take too long."""

    def __init__(self, send: Callable[[Any], Awaitable[None]], stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s

    async def __call__(self, piece: bytes) -> None:
        """Send one piece; raises TimeoutError."""
        async with asyncio.timeout(self._stall_s):
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
