"""ASGI middleware before every route: host, API key, size and nesting of the body, error responses.

The whole body is read within limits of size, time and nesting before a route runs. Every error becomes a response in
OpenAI's format here.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normistral.errors import NormistralError
from normistral.server.admission import RoundRobinSemaphore
from normistral.server.auth import ANONYMOUS, Keys
from normistral.server.errors import (
    JSON_PATHS,
    ApiError,
    as_api_error,
    bug_error,
    document_for,
    header_too_large,
    too_many_connections,
)
from normistral.server.limits import KIB, LINGER_S, ServerLimits
from normistral.server.metrics import Metrics

logger = logging.getLogger(__name__)

_HEAVY_BYTES = 32 * KIB  # bodies that take milliseconds to decode and check, one after the other
_REST = 16  # times the duration of decoding, until the next beside other requests: an eighth of the event loop
_FOR_MONITORS = ("/health", "/ready")
PROTECTED = ("/v1/", "/api/", "/metrics")  # beginnings of paths that need a key
_CONTAINERS = (dict, list)
_OF_BROWSERS = ("origin", "sec-fetch-site")  # in every POST of a page
PREFLIGHT = {  # further headers of the answer to a browser that asks whether a page may ask
    "access-control-allow-methods": "GET, POST",
    "access-control-max-age": "600",
    "access-control-allow-headers": "authorization, content-type, x-api-key, anthropic-version, *",
}


class RequestMiddleware:
    """ASGI middleware.

    Args:
        origins: of pages elsewhere whose scripts may ask (CORS); "*" is every page.
        hosts: names under which the server may be addressed; None is any. A page elsewhere can make a browser here ask
            any server under the page's own name (DNS rebinding), so a server without keys listens to its own only.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        limits: ServerLimits,
        metrics: Metrics,
        hosts: Collection[str] | None,
        origins: Collection[str] = (),
    ) -> None:
        self._origins = origins
        self._app, self._keys, self._limits, self._metrics, self._hosts = app, keys, limits, metrics, hosts
        self._decoding = RoundRobinSemaphore(1)
        self._in_progress = 0  # requests
        self._rest_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = {**scope.get("state", {}), "request_id": uuid.uuid4().hex, "began": time.monotonic()}
        # A copy: the server goes on with its own, and sends no body where the method was HEAD.
        scope = {**scope, "state": state, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        answer = _Answer(scope, receive, send, self._limits.body_bytes, self._origins)
        self._in_progress += 1
        try:
            if is_preflight(scope["method"], answer.origin, self._origins):
                await self._allow(scope, answer)
                return
            body = await self._check(scope, receive, answer)
            await self._app(scope, _replay(body, receive), answer.send)
        except NormistralError as error:
            await self._refuse(as_api_error(error), scope, answer)
        except Exception as bug:
            # Not its words: they could quote a prompt.
            logger.error("a bug: %s in %s", type(bug).__name__, scope["path"], exc_info=_without_words(bug))
            await self._refuse(bug_error(bug), scope, answer)
        finally:
            self._in_progress -= 1
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(answer.status)).inc()
            seconds = time.monotonic() - scope["state"]["began"]
            logger.debug("%s: %s %d in %.3f s", scope["state"]["request_id"], route, answer.status, seconds)

    async def _check(self, scope: Scope, receive: Receive, answer: _Answer) -> bytes:
        """Check a request; returns its body, raises ApiError."""
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.header_bytes:
            raise header_too_large(self._limits)  # h11 looks at those only that did not come at once
        if scope["state"].get("surplus", False) and scope["path"] not in _FOR_MONITORS:
            raise too_many_connections()
        require_known_host(headers.get("host", ""), self._hosts)
        scope["state"]["tenant"] = ANONYMOUS
        if scope["path"].startswith(PROTECTED):
            key = authorization_of(headers.get("authorization"), headers.get("x-api-key"))
            scope["state"]["tenant"] = self._keys.tenant(key)
        if scope["method"] != "POST" or scope["path"] not in JSON_PATHS:
            return b""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        body = await self._read(receive)
        answer.unread = False
        _require_json(scope["path"], headers)
        if len(body) < _HEAVY_BYTES:
            scope["state"]["document"] = self._decode(headers, body)
        else:
            scope["state"]["document"] = await self._decode_large(scope["state"]["tenant"], headers, body)
        return body

    async def _decode_large(self, tenant: str, headers: Headers, body: bytes) -> Any:
        """Decode in round-robin order of the tenants; beside other requests, after a rest for those."""
        async with self._decoding.turn(tenant):
            rest_s = self._rest_until - time.monotonic()
            if rest_s > 0 and self._in_progress > 1:
                await asyncio.sleep(rest_s)
            began = time.monotonic()
            try:
                return self._decode(headers, body)
            finally:
                now = time.monotonic()
                self._rest_until = now + _REST * (now - began)

    def _decode(self, headers: Headers, body: bytes) -> Any:
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise ApiError(415, "the body is compressed", "send it without Content-Encoding", code="compressed")
        try:
            document = msgspec.json.decode(body)
        except RecursionError:
            raise _too_deep(self._limits) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ApiError(400, f"the body is not JSON: {exc}", "send one object in UTF-8", code="not_json") from None
        _require_simple(document, self._limits)
        return document

    async def _read(self, receive: Receive) -> bytes:
        """The body.

        Raises:
            ApiError: 413 as soon as it is too large, 408 when it takes too long.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the connection ended within the body", code="client_left")
                    body += message.get("body", b"")
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            late = f"the body did not arrive within {self._limits.body_s:g} s"
            raise ApiError(408, late, "send it in one go, or send less", code="body_timeout") from None

    async def _refuse(self, error: ApiError, scope: Scope, answer: _Answer) -> None:
        self._metrics.rejected.labels(error.code or str(error.status)).inc()
        if answer.status:  # it has begun, so it can only end; streams tell their errors themselves
            if not answer.ended:
                scope["state"].get("abort", lambda: None)()
            return
        response = JSONResponse(document_for(scope["path"], error), error.status, error.headers)
        await answer.send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
        await answer.send({"type": "http.response.body", "body": response.body})

    async def _allow(self, scope: Scope, answer: _Answer) -> None:
        """Answer a browser that asks whether a page may ask."""
        require_known_host(Headers(scope=scope).get("host", ""), self._hosts)
        headers = [(name.encode(), value.encode()) for name, value in (PREFLIGHT | {"content-length": "0"}).items()]
        await answer.send({"type": "http.response.start", "status": 204, "headers": headers})
        await answer.send({"type": "http.response.body", "body": b""})

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limits.body_bytes} bytes", "send less")


def authorization_of(authorization: str | None, api_key: str | None) -> str | None:
    """The header Authorization, or what X-Api-Key stands for (Anthropic's clients)."""
    return f"Bearer {api_key}" if authorization is None and api_key is not None else authorization


def cors_headers(origin: str | None, origins: Collection[str]) -> dict[str, str]:
    """Headers that let a page of an allowed origin read an answer; none for others."""
    if origin is None or not origins:
        return {}
    if "*" in origins or origin.lower() in origins:
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "x-request-id",
            "vary": "Origin",
        }
    return {"vary": "Origin"}


def is_preflight(method: str, origin: str | None, origins: Collection[str]) -> bool:
    """Whether a browser asks if a page of an allowed origin may ask."""
    return method == "OPTIONS" and "access-control-allow-origin" in cors_headers(origin, origins)


def require_known_host(host: str, hosts: Collection[str] | None) -> None:
    """Raise ApiError for a request that addresses the server under another name than these."""
    if hosts is None:
        return
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.lower() not in hosts:
        raise ApiError(
            403, "this server is not addressed under that name", "see --allowed-host", code="host_not_allowed"
        )


class _Answer:
    """Response of a request: adds its id; closes the connection where the body was not read, and says so where it ends.

    Attributes:
        status: what was sent; 0 is nothing.
        ended: all of it was sent.
        unread: there is more of the request.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int, origins: Collection[str]) -> None:
        self._id = scope["state"]["request_id"].encode()
        self._is_last: Callable[[], bool] = scope["state"].get("last", lambda: False)
        self._receive, self._send, self._most_bytes = receive, send, most_bytes
        headers = Headers(scope=scope)
        self.origin = headers.get("origin")
        self._cors = [
            (name.encode(), value.encode("latin-1")) for name, value in cors_headers(self.origin, origins).items()
        ]
        self.status, self.ended = 0, False
        self.unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            closing = [(b"connection", b"close")] if self.unread or self._is_last() else []
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id), *self._cors, *closing]
        elif self.unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _linger(self) -> None:
        """Discard the rest of the body while the client reads the answer; a reset would discard the answer."""
        taken = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (message := await self._receive()).get("more_body", False) and taken < self._most_bytes:
                    taken += len(message.get("body", b""))


def _replay(body: bytes, receive: Receive) -> Receive:
    """ASGI receive that replays a body, then waits for the disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _require_json(path: str, headers: Headers) -> None:
    """Raise ApiError for a body of another type, which a page of any origin can make a browser send.

    Ollama takes every type, and its clients (curl -d, LiteLLM) write another or none; so its routes take them here from
    all but browsers.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        return
    if not path.startswith("/api/") or any(name in headers for name in _OF_BROWSERS):
        raise ApiError(415, "the body has to be JSON", "send Content-Type: application/json", code="not_json")


def _require_simple(document: Any, limits: ServerLimits) -> None:
    """Raise ApiError for a body over the limits of depth, width and number of values."""
    containers = [document] if type(document) in _CONTAINERS else []
    values, seen = 0, 0
    for _ in range(limits.json_depth + 1):
        if not containers:
            return
        values += sum(map(len, containers))
        seen += len(containers)
        if seen > limits.json_containers:
            raise _too_many(f"more than {limits.json_containers} arrays and objects")
        if values > limits.json_values:
            raise _too_many(f"more than {limits.json_values} values")
        if any(isinstance(value, dict) and len(value) > limits.json_members for value in containers):
            raise _too_many(f"an object of more than {limits.json_members} members")
        containers = [
            inner
            for value in containers
            for inner in (value.values() if isinstance(value, dict) else value)
            if type(inner) in _CONTAINERS  # in a list of 100,000 numbers twice as quick as isinstance
        ]
    raise _too_deep(limits)


def _too_many(what: str) -> ApiError:
    return ApiError(400, f"the body has {what}", "send less", code="too_large")


def _too_deep(limits: ServerLimits) -> ApiError:
    return ApiError(400, f"the body nests more than {limits.json_depth} deep", "send less", code="too_deep")


def _without_words(bug: Exception) -> tuple[type[Exception], Exception, Any]:
    kind = type(bug)
    return kind, kind.__new__(kind), bug.__traceback__  # not kind(): some cannot be made of nothing
