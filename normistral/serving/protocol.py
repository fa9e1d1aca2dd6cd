"""uvicorn's HTTP/1.1 connection, with limits that it does not have: senders that dawdle, and too many of them.

What h11 cannot read is answered in OpenAI's shape too, and with the status that h11 proposes (431 for long headers).
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from normistral.serving.errors import ApiError, header_too_large
from normistral.serving.limits import ServerLimits

_LINGER_S = 2.0  # for the sender of a refused request to read that, before a reset takes it away


class LimitedProtocol(H11Protocol):
    """One connection."""

    limits: ClassVar[ServerLimits]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._header_timer: asyncio.TimerHandle | None = None
        self._discarding = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections", "ask again later", code="connections", retry_after_s=5))
        else:
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._header_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the request was refused."""
        if self._discarding:
            return
        if not self._answering and self._header_timer is None:
            self._await_header()
        super().data_received(data)
        if self._answering:
            self._header_arrived()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        exc = sys.exception()
        status = getattr(exc, "error_status_hint", 400)
        if status == 431:
            self._refuse(header_too_large(self.limits))
        else:
            self._refuse(ApiError(status, "this is no HTTP/1.1 request", code="not_http"))

    @property
    def _answering(self) -> bool:
        """A request's headers are whole and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.document).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with suppress(h11.LocalProtocolError):  # in the midst of an answer there is nothing to say
            response = h11.Response(
                status_code=error.status,
                headers=[*headers, *error.headers.items()],
                reason=STATUS_PHRASES[error.status],
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._discarding = True
        with suppress(OSError, NotImplementedError):
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_s, self.transport.close)

    def _header_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _abort(self) -> None:
        """Close without waiting for a reader who does not read."""
        self.transport.abort()


def limited_protocol(limits: ServerLimits) -> type[LimitedProtocol]:
    """The protocol with these limits; uvicorn makes its connections itself."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
