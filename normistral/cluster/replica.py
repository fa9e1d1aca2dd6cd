"""One replica behind Ray Serve: the application of `normistral serve`, called in its own process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Scope

from normistral.cluster.request import ResponseStart, ServeRequest
from normistral.errors import EngineError
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.limits import ServerLimits
from normistral.server.service import Service
from normistral.server.startup import EngineOptions, open_artifacts

_POLL_S = 0.1
_WAITING_PIECES = 16  # that nobody has fetched yet; then the answer waits for its reader


class Replica:
    """Deployment class of a replica: lifecycle, health checks and requests of Serve."""

    async def __init__(self, artifact: str, engine: EngineOptions, limits: ServerLimits, keys: Keys) -> None:  # type: ignore[misc]
        self._app = create_app(open_artifacts([artifact], engine, limits), limits, keys)
        self._service: Service = self._app.state.service
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        await wait_until_loaded(self._service, None)

    async def answer(self, request: ServeRequest) -> AsyncIterator[ResponseStart | bytes]:
        """The answer's status and headers, then its body as it is written.

        Whoever stops listening frees the slot: to the application that is a client who has left. A worker process that
        is started anew is waited for, because Serve goes on sending requests here.
        """
        with suppress(TimeoutError):  # the application refuses it
            await wait_until_loaded(self._service, self._service.limits.queue_s)
        async for piece in run_application(self._app, request):
            yield piece

    async def metrics(self) -> tuple[str, str]:
        """Serve's name for this replica, and its figures in Prometheus' text format."""
        from ray import serve

        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.render().decode()

    async def ready(self) -> bool:
        """Whether it can answer now."""
        return self._service.ready

    async def check_health(self) -> None:
        """Raise while this replica cannot answer.

        Its worker process is started anew by itself; Serve replaces the replica after three failures in a row.
        """
        _raise_failure(self._service)
        if not self._service.ready:
            raise EngineError("the worker process is not ready", "Serve replaces this replica if that lasts")

    async def __del__(self) -> None:
        with suppress(AttributeError):  # it failed before it was made
            await self._lifespan.__aexit__(None, None, None)


async def wait_until_loaded(service: Service, patience_s: float | None) -> None:
    """Until all models can answer, or no more answers are begun.

    Raises:
        NormistralError: a model could not be loaded.
        TimeoutError: it took longer.
    """
    async with asyncio.timeout(patience_s):
        while not (service.ready or service.stopping):
            _raise_failure(service)
            await asyncio.sleep(_POLL_S)


def _raise_failure(service: Service) -> None:
    for model in service.models.values():
        if model.worker.failure is not None:
            raise model.worker.failure


async def run_application(app: ASGIApp, request: ServeRequest) -> AsyncIterator[ResponseStart | bytes]:
    """Call an ASGI application and give what it sends; when this is closed, it hears that the client has left."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue(_WAITING_PIECES)
    left = asyncio.Event()
    bodies = [request.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message | None) -> None:
        if not left.is_set():
            await sent.put(message)

    async def run() -> None:
        try:
            await app(_scope(request, running.cancel), receive, send)
        finally:
            await send(None)

    running = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield ResponseStart(
                    message["status"], [(bytes(key), bytes(value)) for key, value in message["headers"]]
                )
            elif message.get("body"):
                yield message["body"]
        await running
    finally:
        left.set()
        while not sent.empty():  # lets go whoever waits for room in it
            sent.get_nowait()
        await asyncio.wait([running])


def _scope(request: ServeRequest, abort: Callable[[], object]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": request.query,
        "headers": request.headers,
        "client": None,
        "server": None,
        "state": {"abort": abort},
    }
