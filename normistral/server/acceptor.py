"""Listening sockets and connections that have sent no request for the application yet.

A connection of asyncio costs 0.3 ms before its first byte, and a request 0.7 ms in the application. Here they cost 0.02
and 0.05 ms, within a share of the event loop, so that a flood without a key does not delay requests with a key:

- A silent connection is a bare socket; the oldest is closed when there are too many.
- A request without a valid key is answered from its head (`PublicRoutes`).
- A request with a valid key moves its connection to a `LimitedProtocol` for good.
- Any other request does so too, one every 5 ms, and its connection is closed after the answer.
"""

from __future__ import annotations

import asyncio
import heapq
import re
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from normistral.server.limits import KIB, LINGER_S, ServerLimits
from normistral.server.protocol import LimitedProtocol
from normistral.server.public_routes import Head, PublicRoutes, parse_head

_READ_BYTES = 64 * KIB
_ACCEPTED = 32  # in one turn, before others have theirs
_ACCEPT_S, _SERVE_S = 0.001, 0.002  # of the event loop at once
_SHARE = 0.12  # of the event loop while the application answers, and for a moment afterwards
_BUSY_S = 0.25
_SAVED_S = 0.02  # that may be spent at once after a pause
_MOST_DEBT_S = -0.003  # a pause is at most as long as it takes to gain that
_PER_APPLICATION_REQUEST_S = 0.005  # from one request without access that the application answers to the next
_DEFERRED = 256  # such requests that may wait
_SWEEP_S = 0.25
_LEAST_BYTES_PER_S = 16 * KIB  # that a reader of a long answer takes
_NO_ROOM_PAUSE_S = 0.1
_PATIENCE_S = 0.01  # from a connection to its request, before it may be ended to make room
_PATIENCE_PAUSE_S = 0.002
_LONG_QUEUE = 512  # connections; then each has had time to send its request before it is accepted
_SMALL_BYTES = 8 * KIB  # cost as much to parse as everything else of a request
_FIRST_PRINTABLE = 0x21  # no request begins with a byte below; h11 refuses it before a line is whole
_HEAD_END = re.compile(rb"\n\r?\n")


@dataclass(eq=False, slots=True)
class _Connection:
    """Socket without a protocol."""

    socket: socket.socket
    since: float
    deadline: float
    received: bytes = b""
    unsent: bytes = b""
    idle: bool = False  # between two requests
    discarding: bool = False  # answered for the last time; what still comes is dropped
    discarded: int = 0  # bytes
    queued: bool = False
    tag: float = 0.0  # virtual time of the next read: small requests before it


class Acceptor:
    """Listening sockets of a server, and connections without a protocol.

    Args:
        make_protocol: as `asyncio.loop.create_server` takes it.
        held: sockets at once.
        is_busy: whether the application answers requests, so that the rest has its share only.
        date: the value of the header.
    """

    def __init__(
        self,
        make_protocol: Callable[[], LimitedProtocol],
        routes: PublicRoutes,
        limits: ServerLimits,
        held: int,
        is_busy: Callable[[], bool],
        date: Callable[[], bytes],
    ) -> None:
        self._make_protocol, self._routes, self._limits = make_protocol, routes, limits
        self._most, self._is_busy, self._date = held, is_busy, date
        self._loop = asyncio.get_running_loop()
        self._selector = selectors.DefaultSelector()
        self._listeners: Sequence[socket.socket] = ()
        self._held: dict[int, _Connection] = {}  # by descriptor; who has waited longest comes first
        self._ready: list[tuple[float, int, _Connection]] = []  # heap by start tag, then by arrival
        self._virtual, self._arrivals = 0.0, 0  # start tag of the connection served last
        self._deferred: deque[tuple[socket.socket, bytes]] = deque()
        self._tasks: set[asyncio.Task[object]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._budget_s, self._budget_at = _SAVED_S, time.monotonic()
        self._busy_until = 0.0

    def listen(self, listeners: Sequence[socket.socket], backlog: int) -> None:
        """Begin to accept."""
        self._listeners = listeners
        for listener in listeners:
            listener.setblocking(False)
            with suppress(OSError):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit it
            listener.listen(backlog)
        self._resume()
        self._sweep()

    def close(self) -> None:
        """Stop accepting and close the held sockets."""
        self._pause()
        for timer in self._timers.values():
            timer.cancel()
        for connection in list(self._held.values()):
            self._end(connection)
        while self._deferred:
            self._deferred.popleft()[0].close()
        self._selector.close()

    def _resume(self) -> None:
        for source in self._sources:
            self._loop.add_reader(source, self._turn)

    def _pause(self) -> None:
        for source in self._sources:
            self._loop.remove_reader(source)

    @property
    def _sources(self) -> tuple[Any, ...]:
        return (self._selector, *self._listeners)

    def _turn(self) -> None:
        """Accept and serve for at most 3 ms; pause when the share of the event loop is used up."""
        began, began_cpu_s = time.monotonic(), time.thread_time()  # others may take the processor in between
        if self._is_busy():
            self._busy_until = began + _BUSY_S
        busy = began < self._busy_until
        gained_s = _SHARE * (began - self._budget_at) if busy else _SAVED_S
        self._budget_s, self._budget_at = min(_SAVED_S, self._budget_s + gained_s), began
        for listener in self._listeners:
            self._accept(listener, began)
        self._serve_ready()
        if busy:
            self._budget_s = max(_MOST_DEBT_S, self._budget_s - (time.thread_time() - began_cpu_s))
            if self._budget_s < 0:
                self._pause()
                self._set_timer("resume", -self._budget_s / _SHARE, self._resume)

    def _serve_ready(self) -> None:
        """Serve connections in the order of start-time fair queuing (Goyal, Vin and Cheng, 1996).

        A connection with few requests precedes one with many.
        """
        for key, _ in self._selector.select(0):
            self._queue(key.data)
        began = time.monotonic()
        while self._ready and time.monotonic() - began < _SERVE_S:
            self._virtual, _, connection = heapq.heappop(self._ready)
            connection.queued = False
            self._continue(connection)

    def _queue(self, connection: _Connection) -> None:
        if not connection.queued:
            connection.queued, connection.tag = True, max(self._virtual, connection.tag)
            self._arrivals += 1
            heapq.heappush(self._ready, (connection.tag, self._arrivals, connection))

    def _accept(self, listener: socket.socket, began: float) -> None:
        for _ in range(_ACCEPTED):
            if self._is_full and self._is_oldest_new() and _queue_length(listener) < _LONG_QUEUE:
                self._pause()
                self._set_timer("resume", _PATIENCE_PAUSE_S, self._resume)
                return
            try:
                accepted, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._make_room()
                self._pause()
                self._set_timer("resume", _NO_ROOM_PAUSE_S, self._resume)
                self._loop.call_exception_handler({"message": "accept", "exception": exc})
                return
            accepted.setblocking(False)
            connection = _Connection(accepted, began, began + self._limits.header_s)
            if self._is_full:
                self._make_room()
            self._held[accepted.fileno()] = connection
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            self._queue(connection)  # most clients send their request with the connection
            if time.monotonic() - began > _ACCEPT_S:
                return

    @property
    def _is_full(self) -> bool:
        return len(self._held) + len(self._deferred) >= self._most

    def _is_oldest_new(self) -> bool:
        oldest = next(iter(self._held.values()), None)
        return oldest is not None and time.monotonic() - oldest.since < _PATIENCE_S

    def _make_room(self) -> None:
        """Close the oldest held connection; a request that has arrived meanwhile is served first."""
        oldest = next(iter(self._held.values()), None)
        if oldest is None:
            return
        if not oldest.unsent:
            self._read(oldest)
        if self._held.get(oldest.socket.fileno()) is oldest:
            self._end(oldest)

    def _continue(self, connection: _Connection) -> None:
        if self._held.get(connection.socket.fileno()) is not connection:  # ended or handed over since it was ready
            return
        if connection.unsent:
            self._send(connection)
        else:
            self._read(connection)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        connection.tag += 1 + len(data) / _SMALL_BYTES
        if not data:
            self._end(connection)
        elif connection.discarding:
            connection.discarded += len(data)
            if connection.discarded > self._limits.body_bytes:
                self._end(connection)
        else:
            if connection.idle:
                connection.idle, connection.deadline = False, time.monotonic() + self._limits.header_s
            connection.received += data
            self._answer(connection)

    def _answer(self, connection: _Connection) -> None:
        """Answer a complete head, or hand the connection over."""
        received = connection.received
        end = _HEAD_END.search(received)
        if end is None:
            if received[0] < _FIRST_PRINTABLE or len(received) > self._limits.header_bytes:
                self._defer(connection)
            return
        head = parse_head(received[: end.end()])
        if head is not None and self._routes.has_access(head):
            self._hand_over(self._release(connection), received, single=False)
            return
        answer = None if head is None else self._routes.answer(head)
        if head is None or answer is None:
            self._defer(connection)
            return
        connection.received = b""
        connection.discarding = _is_last(head, received[end.end() :])
        connection.unsent = self._routes.render(head, answer, self._date(), close=connection.discarding)
        seconds = len(connection.unsent) / _LEAST_BYTES_PER_S
        connection.deadline = time.monotonic() + self._limits.stall_s + seconds
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.unsent)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._end(connection)
            return
        was_waiting = self._selector.get_key(connection.socket).events == selectors.EVENT_WRITE
        connection.unsent = connection.unsent[sent:]
        if bool(connection.unsent) is not was_waiting:
            events = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
            self._selector.modify(connection.socket, events, connection)
        if connection.unsent:
            return
        if connection.discarding:
            connection.deadline = time.monotonic() + LINGER_S
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        else:
            connection.idle, connection.deadline = True, time.monotonic() + self._limits.keep_alive_s
        descriptor = connection.socket.fileno()
        self._held[descriptor] = self._held.pop(descriptor)  # behind those that are silent

    def _defer(self, connection: _Connection) -> None:
        """Queue a request without access for the application."""
        received, taken = connection.received, self._release(connection)
        if not self._deferred and "deferred" not in self._timers:
            self._hand_over(taken, received, single=True)
            self._set_timer("deferred", _PER_APPLICATION_REQUEST_S, self._next_deferred)
            return
        self._deferred.append((taken, received))
        if len(self._deferred) > min(_DEFERRED, self._most // 2):
            self._deferred.popleft()[0].close()

    def _next_deferred(self) -> None:
        del self._timers["deferred"]
        if self._deferred:
            taken, received = self._deferred.popleft()
            self._hand_over(taken, received, single=True)
            self._set_timer("deferred", _PER_APPLICATION_REQUEST_S, self._next_deferred)

    def _hand_over(self, connection: socket.socket, received: bytes, *, single: bool) -> None:
        protocol = self._make_protocol()
        protocol.received, protocol.single = received, single
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: protocol, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release(self, connection: _Connection) -> socket.socket:
        del self._held[connection.socket.fileno()]
        self._selector.unregister(connection.socket)
        return connection.socket

    def _end(self, connection: _Connection) -> None:
        self._release(connection)
        if connection.unsent:
            with suppress(OSError):  # a reset, or the system would go on offering what was not read
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.socket.close()

    def _sweep(self) -> None:
        """Close connections past their deadline, unless what is waited for has come while this process was busy."""
        now = time.monotonic()
        for connection in [one for one in self._held.values() if one.deadline < now]:
            self._continue(connection)
            if self._held.get(connection.socket.fileno()) is connection and connection.deadline < now:
                self._end(connection)
        self._set_timer("sweep", _SWEEP_S, self._sweep)

    def _set_timer(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self._loop.call_later(seconds, act)


def _is_last(head: Head, rest: bytes) -> bool:
    """Whether the connection closes after this answer: asked for, with a body, or pipelined."""
    return head.close or head.has_body or bool(rest)


def _queue_length(listener: socket.socket) -> int:
    """Length of the accept queue; 0 where it is unknown."""
    if sys.platform != "linux":
        return 0
    # struct tcp_info of linux/tcp.h: of a listening socket, tcpi_unacked is the length of the queue
    return int(struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 24)[0])
