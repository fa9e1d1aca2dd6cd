"""Ingress of the deployment: checks requests as the single server does, and routes them to replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from normistral.cluster.request import ResponseStart, ServeRequest, join_metrics, routing_key
from normistral.server import anthropic, ollama, responses_api
from normistral.server.auth import Keys
from normistral.server.errors import ApiError, unavailable
from normistral.server.generation import OPENAI_CHAT, ClientLeftError, Framing, unless_gone
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.middleware import RequestMiddleware

logger = logging.getLogger(__name__)

_ALL_S = 5.0  # for all replicas to answer
_NOT_READY_S = 2.0
_FRAMINGS = {
    "/v1/messages": anthropic.FRAMING,
    "/v1/responses": responses_api.FRAMING,
    "/api/chat": ollama.FRAMING,
    "/api/generate": ollama.FRAMING,
}
_NOT_PASSED_ON = {b"x-request-id", b"content-length", b"transfer-encoding", b"connection"}


class Ingress:
    """Ingress without a model, with the connection limits of one server.

    Args:
        models: of the deployment whose replicas answer.
        busy_s: what a client is told to wait when the queue is full.
    """

    def __init__(self, models: DeploymentHandle, limits: ServerLimits, keys: Keys, busy_s: float) -> None:
        self._models, self._limits, self._busy_s = models, limits, busy_s
        self._metrics = Metrics()
        self._under_way = 0
        self._app = RequestMiddleware(self._route, keys=keys, limits=limits, metrics=self._metrics, hosts=None)

    async def __call__(self, request: Request) -> Response:
        """Answer a request; the answer is computed while it is sent."""
        return _Running(self._app)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/ready":
            await self._tell_ready(scope, receive, send)
        elif scope["path"] == "/metrics":
            await self._tell_metrics(scope, receive, send)
        elif self._under_way >= self._limits.connections:
            raise self._too_many()
        else:
            self._under_way += 1
            try:
                await self._relay(scope, receive, send)
            finally:
                self._under_way -= 1

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and what comes back.

        Raises:
            ApiError: nothing came back; after that, errors are told within the answer.
        """
        body = (await receive()).get("body", b"")
        headers = Headers(scope=scope)
        request = ServeRequest(scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), body)
        key = routing_key(scope["state"]["tenant"], headers, body)
        pieces = self._models.options(session_id=key, stream=True).answer.remote(request)
        try:
            start = await unless_gone(self._first(pieces), receive)
            await send({"type": "http.response.start", "status": start.status, "headers": _passed_on(start.headers)})
            framing = _FRAMINGS.get(request.path, OPENAI_CHAT)
            await unless_gone(self._rest(pieces, start, framing, send), receive)
        except ClientLeftError:
            pass
        finally:
            with suppress(BackPressureError):  # told again of a request that was refused
                pieces.cancel()

    async def _first(self, pieces: AsyncIterator[Any]) -> ResponseStart:
        try:
            async with asyncio.timeout(self._limits.queue_s + self._limits.request_s):
                return ResponseStart(*await anext(pieces))
        except BackPressureError:
            raise self._too_many() from None
        except TimeoutError:
            raise unavailable("no replica answered in time", code="timeout") from None
        except (RayError, RayServeException, StopAsyncIteration) as exc:
            raise _lost(exc) from None

    async def _rest(self, pieces: AsyncIterator[Any], start: ResponseStart, framing: Framing, send: Send) -> None:
        """The body; an error within a stream is told as the single server tells it, and ends everything else."""
        sent = 0
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                sent += 1
        except (RayError, RayServeException) as exc:
            error = _lost(exc)
            if not _is_stream(start, framing):
                raise error from None
            event = framing.describe(error)
            if "sequence_number" in event:  # a piece is an event
                event["sequence_number"] = sent
            await send({"type": "http.response.body", "body": framing.encode(event), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _tell_ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        if True not in await self._ask_all("ready"):
            raise unavailable("no replica is ready", code="not_ready", retry_after_s=_NOT_READY_S)
        await JSONResponse({"status": "ready"})(scope, receive, send)

    async def _tell_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = [told for told in await self._ask_all("metrics") if isinstance(told, tuple)]
        text = join_metrics({"front": self._metrics.render().decode()} | dict(told))
        await Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")(scope, receive, send)

    async def _ask_all(self, method: str) -> list[Any]:
        """Results or exceptions of all replicas, including those without a free slot.

        Raises:
            ApiError: they took too long.
        """
        try:
            answers: list[Any] = await self._models.broadcast(method).results_async(
                timeout_s=_ALL_S, return_exceptions=True
            )
        except TimeoutError:
            raise unavailable("the replicas do not answer", code="not_ready", retry_after_s=_NOT_READY_S) from None
        except (RayError, RayServeException) as exc:
            raise _lost(exc) from None
        return answers

    def _too_many(self) -> ApiError:
        return ApiError(
            429,
            "too many requests wait for a replica",
            "ask again later",
            code="queue_full",
            retry_after_s=self._busy_s,
        )


class _Running(Response):
    """Adapter: ASGI application as the response that Serve expects."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _NOT_PASSED_ON]


def _is_stream(start: ResponseStart, framing: Framing) -> bool:
    kind = framing.media_type.encode()
    return any(name.lower() == b"content-type" and value.startswith(kind) for name, value in start.headers)


def _lost(exc: BaseException) -> ApiError:
    if isinstance(exc, DeploymentUnavailableError):
        return unavailable("there is no replica: none could be started", "see Ray's logs", code="no_replica")
    # Serve's own errors are those of a replica that went between being chosen and being asked.
    if isinstance(exc, RayActorError | RayServeException | StopAsyncIteration):
        return unavailable("the replica that was to answer is gone", "ask again", code="replica_lost", retry_after_s=1)
    logger.error("Ray: %s", type(exc).__name__)  # its words could quote a prompt
    return ApiError(500, f"a replica failed ({type(exc).__name__})", "see Ray's logs", code="replica_failed")
