"""uvicorn's HTTP/1.1 connection, with a limit in force at every moment.

uvicorn limits only the time between two requests, and closes gracefully, which waits for the reader. Here each phase of
a connection has a deadline (`_Phase`), after which the connection is reset.

h11 accepts heads that proxies and other servers may parse differently, which enables request smuggling: a length beside
chunks, lines without CR, folded headers; and any number of header lines and chunks. `StrictConnection` refuses them
(RFC 9112). Parse errors are answered in OpenAI's format with the status that h11 proposes (431 for long headers).
"""

from __future__ import annotations

import asyncio
import enum
import json
import re
import socket
import sys
from contextlib import suppress
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from normistral.server.errors import ApiError, header_too_large, too_many_connections
from normistral.server.limits import LINGER_S, ConnectionPool, ServerLimits

_READ_BYTES = 64 * 1024  # at once; what is parsed in one go keeps the others waiting
_SURPLUS_S = 1.0  # for the head of a request on a connection that is one too many
_LEAST_BYTES_PER_S = 16 * 1024  # that a reader of a long answer takes
_SPARE_S = 5.0  # for an answer that its own limits end
_HEADER_LINES = 100  # a browser sends 20; http.client takes as many
_CHUNKS = 1024  # of one body
_WAITING_LINES = 4096  # of a chunked body, in one read: trailers are parsed line by line
_HEAD_END = re.compile(rb"\n\r?\n")
_LONE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"\ncontent-length\s*:", re.IGNORECASE)
_FOLDED = re.compile(rb"\n[ \t]")
_VERSIONS = (b"1.0", b"1.1")


class _Phase(enum.Enum):
    """Phase of a connection; `_seconds` gives its time limit."""

    HEAD = enum.auto()  # waits for a request
    IDLE = enum.auto()  # waits for a further request
    BODY = enum.auto()  # waits for the rest of one
    ANSWER = enum.auto()  # the client waits
    WRITE = enum.auto()  # an answer waits to be taken
    REFUSED = enum.auto()  # takes what still comes, so that the sender reads the refusal and no reset


class LimitedProtocol(H11Protocol):
    """One connection.

    Attributes:
        received: bytes that came before it was made.
        single: it is closed after one answer.
    """

    limits: ClassVar[ServerLimits]
    pool: ClassVar[ConnectionPool]
    received = b""
    single = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = StrictConnection(self.limits)
        self._served = False
        self._phase: _Phase | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._discarded = 0  # bytes behind a request that is being answered or was refused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection, or mark it as surplus."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every byte that is not taken
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        limit_unread(transport.get_extra_info("socket"), self.limits.stall_s)
        self._served = self.pool.admit(self, len(self.connections))
        self.app_state = {
            **self.app_state,
            "abort": self.leave,
            "surplus": not self._served,
            "last": lambda: not self.cycle.keep_alive,
        }
        self._enter(_Phase.HEAD)
        if self.received:
            received, self.received = self.received, b""
            self.data_received(received)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release timer and place in the pool."""
        self.pool.remove(self)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, or discard them after the last request."""
        if self._phase is _Phase.REFUSED or (self._answering and not self.cycle.more_body):
            self._discard(len(data))
            return
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
        super().data_received(data)
        if self._answering and (self.single or not self._served):
            self.cycle.keep_alive = False
        if self._answering and not self.cycle.more_body and self.conn.trailing_data[0]:
            self._discard(len(data))
        self._review()
        if self._phase is _Phase.BODY:
            self.pool.mark_waiting(self)  # that was progress

    def on_response_complete(self) -> None:
        """Update the phase after a response."""
        super().on_response_complete()
        self._review()

    def pause_writing(self) -> None:
        """Update the phase: the peer reads too slowly."""
        super().pause_writing()
        self._review()

    def resume_writing(self) -> None:
        """Update the phase: the write buffer is empty."""
        super().resume_writing()
        self._review()

    def send_400_response(self, msg: str) -> None:
        """Refuse input that is not HTTP/1.1."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if status == 431:
            self._refuse(header_too_large(self.limits))
        else:
            self._refuse(ApiError(status, "this is no HTTP/1.1 request that can be read", code="not_http"))

    def leave(self) -> None:
        """Close at once; unsent data is dropped."""
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _review(self) -> None:
        """Enter the phase that the connection's state asks for."""
        if self._phase is _Phase.REFUSED or (self.transport.is_closing() and not self.flow.write_paused):
            return
        if self.flow.write_paused:
            phase = _Phase.WRITE
        elif self._answering:
            phase = _Phase.BODY if self.cycle.more_body else _Phase.ANSWER
        else:
            begun = self.cycle is None or self.conn.trailing_data[0]
            phase = _Phase.HEAD if begun else _Phase.IDLE
        if phase is not self._phase:
            self._enter(phase)

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        if phase is _Phase.ANSWER:
            self.pool.mark_busy(self)
        else:
            self.pool.mark_waiting(self)
        self._deadline = self.loop.time() + self._seconds(phase)
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer()

    def _seconds(self, phase: _Phase) -> float:
        limits = self.limits
        match phase:
            case _Phase.HEAD:
                return limits.header_s if self._served else min(limits.header_s, _SURPLUS_S)
            case _Phase.IDLE:
                return limits.keep_alive_s + _SPARE_S  # uvicorn closes it before
            case _Phase.BODY:
                return limits.body_s + _SPARE_S
            case _Phase.ANSWER:
                return limits.queue_s + limits.request_s + _SPARE_S
            case _Phase.WRITE:
                return limits.stall_s + self.transport.get_write_buffer_size() / _LEAST_BYTES_PER_S
            case _Phase.REFUSED:
                return LINGER_S

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        """The deadline that was in force when the timer was set has come."""
        if self.loop.time() < self._deadline:
            self._set_timer()
        elif self._phase is _Phase.HEAD and not self._served:
            self._refuse(too_many_connections())
        else:
            self.leave()

    def _discard(self, count: int) -> None:
        """Discard pipelined data (RFC 9112, 9.3.2, lets a server close instead)."""
        self._discarded += count
        if self._answering:
            self.cycle.keep_alive = False
            self.flow.resume_reading()  # h11 has paused it, and nobody would see the client leave
        if self._discarded > self.limits.body_bytes:
            self.leave()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.document).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with suppress(h11.LocalProtocolError):  # in the midst of an answer there is nothing to say
            response = h11.Response(
                status_code=error.status,
                headers=[*headers, *error.headers.items()],
                reason=STATUS_PHRASES[error.status],
            )
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self._answering:  # whoever reads the body learns that there is no more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._enter(_Phase.REFUSED)
        with suppress(OSError, NotImplementedError):
            self.transport.write_eof()


def limit_unread(connection: socket.socket, stall_s: float) -> None:
    """Set TCP_USER_TIMEOUT: the system drops a connection whose peer does not read, also after close."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux: tcp(7)
    if option is not None:
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, option, int(1000 * stall_s))


def limited_protocol(limits: ServerLimits, pool: ConnectionPool) -> type[LimitedProtocol]:
    """The protocol with these limits; uvicorn makes its connections itself."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "pool": pool})


class StrictConnection(h11.Connection):
    """The server's end of one connection. `next_event` raises `h11.RemoteProtocolError` for more than h11's does."""

    def __init__(self, limits: ServerLimits) -> None:
        super().__init__(h11.SERVER, limits.header_bytes)
        self._chunked = False
        self._chunks = 0
        self._lines = 0  # of a chunked body, that were received and not read

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the network."""
        if self._chunked:
            self._lines += data.count(b"\n")
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event."""
        if self.their_state is h11.IDLE:
            self._check_head()
        elif self._chunked and self._lines > _WAITING_LINES:
            raise _refusal("too many lines of chunks")
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._check_request(event)
        elif isinstance(event, h11.Data):
            self._lines -= event.data.count(b"\n") + 2 * event.chunk_start
            self._chunks += event.chunk_start
            if self._chunks > _CHUNKS:
                raise _refusal("too many chunks", 413)
        elif isinstance(event, h11.EndOfMessage):
            self._chunked = False
        return event

    def _check_head(self) -> None:
        """Look at the lines of a request's head before h11 parses them."""
        received, _ = self.trailing_data
        end = _HEAD_END.search(received)
        head = received if end is None else received[: end.end()]
        if head.count(b"\n") > _HEADER_LINES + 2:  # with the request line and the empty one
            raise _refusal(f"more than {_HEADER_LINES} headers", 431)
        if _LONE_LF.search(head) or _FOLDED.search(head):
            raise _refusal("lines that do not end as they have to")
        if len(_LENGTH.findall(head)) > 1:  # h11 takes them for one where they are the same
            raise _refusal("more than one length")

    def _check_request(self, request: h11.Request) -> None:
        names = [name for name, _ in request.headers]
        self._chunked, self._chunks = b"transfer-encoding" in names, 0
        self._lines = self.trailing_data[0].count(b"\n") if self._chunked else 0
        lengths = [value for name, value in request.headers if name == b"content-length"]
        if request.http_version not in _VERSIONS:
            raise _refusal("another version", 505)
        if (lengths and self._chunked) or (self._chunked and request.http_version == b"1.0"):
            raise _refusal("a body whose end can be read in two ways")
        if not request.target.startswith(b"/"):
            raise _refusal("a target that is no path here")


def _refusal(reason: str, status: int = 400) -> h11.RemoteProtocolError:
    return h11.RemoteProtocolError(reason, error_status_hint=status)
