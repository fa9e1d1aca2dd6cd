"""Answers whose reader may leave, read slowly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normistral.errors import NormistralError
from normistral.server.errors import ApiError, as_api_error

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
        close: called when it is over, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the connection of a reader who takes none is ended, and then the client has left."""
        try:
            await unless_gone(self._send(send), receive)
        except ClientLeftError:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def write(piece: bytes) -> None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        await write(_event(first))
        try:
            async for event in self._events:
                await write(_event(event))
            await write(_DONE)
        except NormistralError as error:
            await write(_event(as_api_error(error).document))
        await send({"type": "http.response.body", "body": b""})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
