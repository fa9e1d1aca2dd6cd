"""uvicorn around the application: where it listens, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from normistral.errors import NormistralError, UsageError
from normistral.server.acceptor import Acceptor
from normistral.server.limits import KIB, ConnectionPool, plan_connections
from normistral.server.protocol import LimitedProtocol, limit_unread, limited_protocol
from normistral.server.public_routes import PublicRoutes
from normistral.server.service import Service

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 3  # for streams to send the error that ended them
_POLL_S = 0.02
# Connections that the system keeps until they are accepted; Linux takes at most net.core.somaxconn. One more is not
# answered, and its client tries again after a second. A full queue is accepted within 0.1 s.
_BACKLOG = 4096
# For which a thread that renders a prompt keeps the interpreter when the event loop wants it, which is after every read
# and write. Python's own 5 ms are half a second for a hundred connections.
_SWITCH_S = 0.0005
_QUIET_S = 60.0  # after a message about connections that cannot be accepted
_ACCEPT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SEND_BUFFER = 128 * KIB  # some hundred events; Linux would let it grow to megabytes for a reader who takes nothing


class ApiServer(uvicorn.Server):
    """A server that ends when it is told to, when none of its models can be loaded, and otherwise never.

    The first signal lets answers under way finish within the grace time; new ones get 503. The second ends at once.

    Args:
        app: made by `create_app`.
        on_started: called when it listens.
        on_ready: called when all models can answer for the first time.

    Attributes:
        failure: why it ended by itself.
    """

    def __init__(
        self,
        app: FastAPI,
        on_started: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.service: Service = app.state.service
        limits = self.service.limits
        plan = plan_connections(limits.connections)
        protocol = limited_protocol(limits, ConnectionPool(plan.served, plan.spare))
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )
        self.failure: NormistralError | None = None
        self._protocol, self._held = protocol, plan.held
        self._public_routes: PublicRoutes = app.state.public_routes
        self._acceptor: Acceptor | None = None
        self._on_started, self._on_ready = on_started, on_ready
        self._told_ready = False
        self._stop_asked = False
        self._deadline: float | None = None
        self._quiet_until = 0.0
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the middleware logs, without texts of requests

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. (uvicorn would raise it again at the end, and the exit code would be its.)"""
        if self._stop_asked:
            self.should_exit = self.force_exit = True
        self._stop_asked = True

    def stop(self) -> None:
        """As the first signal; may be called from any thread."""
        self._stop_asked = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        if not sockets or not hasattr(selectors.DefaultSelector, "fileno"):  # Windows has no selector of selectors
            await super().startup(sockets)
        else:
            await super().startup([])
            for listener in sockets:
                limit_unread(listener, self.service.limits.stall_s)  # its connections inherit it
            self._acceptor = Acceptor(
                self._make_protocol,
                self._public_routes,
                self.service.limits,
                self._held,
                lambda: bool(self.server_state.tasks),
                lambda: dict(self.server_state.default_headers).get(b"date") or formatdate(usegmt=True).encode(),
            )
            self._acceptor.listen(sockets, _BACKLOG)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and end what is left."""
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets)

    def _make_protocol(self) -> LimitedProtocol:
        return self._protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is over."""
        if await super().on_tick(counter):
            self.service.abort()
            return True
        if self.service.ready and not self._told_ready:
            self._told_ready = True
            gc.freeze()  # modules and tables stay; to look through them again took 50 ms of everybody's time
            self._on_ready()
        self.failure = self.service.failure
        if self.failure is not None:
            return True
        return self._stop_asked and self._drained()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """One line a minute where no connection can be accepted; asyncio would write a page for each that waits."""
        exc = context.get("exception")
        if not isinstance(exc, OSError) or exc.errno not in _ACCEPT_ERRORS:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET_S
            logger.error("connections cannot be accepted: %s", exc.strerror)

    def _drained(self) -> bool:
        """Whether everything under way is done, or its time is over."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.service.limits.grace_s
            self.service.stop_accepting()
        if self.service.under_way and time.monotonic() < self._deadline:
            return False
        self.service.abort()
        return True


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        port: 0 takes any that is free.

    Raises:
        UsageError: the address is not this machine's, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Named TCP: asyncio switches Nagle's algorithm off only where it is, and 40 ms an answer would go to it.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise UsageError(f"cannot listen on {host} port {port}: {reason}", "take another --port or --host") from exc
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # its connections inherit it
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Where it listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def background_server(app: FastAPI, wait_s: float = 60.0) -> Iterator[str]:
    """A server on a free port of the loopback in a thread of its own, for tests and for embedding; gives its URL.

    Args:
        wait_s: for the models to be ready; 0 does not wait.

    Raises:
        NormistralError: a model could not be loaded.
    """
    listener = bind("127.0.0.1", 0)
    server = ApiServer(app)
    thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + wait_s
        while not server.service.ready and time.monotonic() < deadline and thread.is_alive():
            time.sleep(_POLL_S)
        if server.failure is not None:
            raise server.failure
        yield url_of(listener)
    finally:
        server.stop()
        thread.join()
