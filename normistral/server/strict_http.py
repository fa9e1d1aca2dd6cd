"""h11 with the limits and refusals that it leaves to its user (RFC 9112).

h11 reads what proxies and other servers may read otherwise, which lets one request be smuggled in another: a length
beside chunks, lines that end without CR, folded headers. It also takes any number of header lines and chunks, each of
which costs as much as a kilobyte of text.
"""

from __future__ import annotations

import re

import h11

from normistral.server.limits import ServerLimits

_HEADER_LINES = 100  # a browser sends 20; http.client takes as many
_CHUNKS = 1024  # of one body
_WAITING_LINES = 4096  # of a chunked body, in one read: trailers are parsed line by line
_HEAD_END = re.compile(rb"\n\r?\n")
_LONE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"\ncontent-length\s*:", re.IGNORECASE)
_FOLDED = re.compile(rb"\n[ \t]")
_VERSIONS = (b"1.0", b"1.1")
_BODILESS = (b"GET", b"HEAD", b"OPTIONS", b"DELETE")


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
        if request.method in _BODILESS and (self._chunked or lengths not in ([], [b"0"])):
            raise _refusal("a body where none can be")


def _refusal(reason: str, status: int = 400) -> h11.RemoteProtocolError:
    return h11.RemoteProtocolError(reason, error_status_hint=status)
