"""ASGI application: routes, middleware, and worker processes tied to its lifespan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import normistral
from normistral.server import anthropic, completions, ollama, responses_api
from normistral.server.auth import Keys
from normistral.server.errors import describe_validation, document_for, route_error
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.middleware import PROTECTED, RequestMiddleware
from normistral.server.model_handler import ModelHandler
from normistral.server.public_routes import AnswerSource, PublicAnswer, PublicRoutes, load_page
from normistral.server.residency import ResidencyOptions, ServedModel
from normistral.server.responses import ModelCard, ModelList, Status, error_responses
from normistral.server.responses_api import ResponseStore
from normistral.server.service import Service
from normistral.server.worker_client import WORKER_MODULE

_REQUESTS = ("ChatCompletionRequest", "CompletionRequest")
_OTHER_REQUESTS = ("ResponsesRequest", "MessagesRequest", "OllamaChatRequest", "OllamaGenerateRequest")
_SCHEME = "key"


def create_app(
    handler: Sequence[ModelHandler],
    limits: ServerLimits | None = None,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    worker_module: str = WORKER_MODULE,
    *,
    origins: Collection[str] = (),
    store: bool = False,
    residency: ResidencyOptions | None = None,
) -> FastAPI:
    """Create the application; its workers start and stop with its lifespan.

    Args:
        keys: accepted API keys; None accepts every request.
        hosts, origins: as `RequestMiddleware` takes them.
        worker_module: whose `main` the worker processes run.
        store: keep answers of /v1/responses that ask for it, in memory.
        residency: which models are in memory; None is all of them, always.
    """
    limits, keys, metrics = limits or ServerLimits(), keys or Keys(), Metrics()
    service = Service(handler, limits, metrics, worker_module, several=len(keys) > 1, residency=residency)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="normistral",
        version=normistral.__version__,
        lifespan=lifespan,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # it would be written anew for everybody who asks
        redirect_slashes=False,
    )
    app.state.service = service
    app.openapi = lambda: describe_api(app, service, keys)  # type: ignore[method-assign]
    app.state.response_store = ResponseStore() if store else None
    for routes in (completions.router, responses_api.router, anthropic.router, ollama.router):
        app.include_router(routes)
    pages = {"/": _add_page(app), "/openapi.json": _add_description(app)} | _add_looking(app, service)
    app.state.public_routes = PublicRoutes(keys, limits, metrics, hosts, pages, origins)
    app.add_middleware(RequestMiddleware, keys=keys, limits=limits, metrics=metrics, hosts=hosts, origins=origins)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(HTTPException, _refuse_route)
    return app


def _add_looking(app: FastAPI, service: Service) -> dict[str, AnswerSource]:
    """Add the routes that need no engine; returns the answers of those that need no key."""

    @app.get("/health", response_model=Status)
    async def health() -> dict[str, str]:
        """The server lives."""
        return {"status": "ok"}

    @app.get("/ready", response_model=Status, responses=error_responses(503))
    async def ready() -> dict[str, str]:
        """Requests for all models are answered, but for those that cannot be loaded."""
        if not service.ready:
            raise service.explain_absence()
        return {"status": "ready"}

    @app.get(
        "/metrics", response_class=Response, responses=error_responses(401) | {200: {"content": {"text/plain": {}}}}
    )
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model=ModelList, responses=error_responses(401))
    async def models() -> dict[str, Any]:
        """The models that are served."""
        cards = [_card(model) for model in service.models.values()]
        page = {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
        return {"object": "list", "data": cards, **page}

    @app.get("/v1/models/{model}", response_model=ModelCard, responses=error_responses(401, 404))
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        return _card(service.find(model))

    def find_ready() -> PublicAnswer:
        if not service.ready:
            raise service.explain_absence()
        return _as_json(b'{"status":"ready"}')

    return {"/health": lambda: _as_json(b'{"status":"ok"}'), "/ready": find_ready}


def _add_page(app: FastAPI) -> AnswerSource:
    chat_page = load_page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to chat with."""
        return Response(chat_page.body, headers=chat_page.headers)

    return lambda: chat_page


def _add_description(app: FastAPI) -> AnswerSource:
    described: asyncio.Future[bytes] | None = None

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        """The description of the API, made once and beside the requests of others: it takes a fifth of a second."""
        nonlocal described
        if described is None:
            described = asyncio.ensure_future(asyncio.to_thread(lambda: msgspec.json.encode(app.openapi())))
        return Response(await asyncio.shield(described), media_type="application/json")

    return lambda: _as_json(described.result()) if described is not None and described.done() else None


def _as_json(body: bytes) -> PublicAnswer:
    return PublicAnswer(200, {"content-type": "application/json"}, body)


def _card(model: ServedModel) -> dict[str, Any]:
    handler = model.handler
    created = datetime.fromisoformat(handler.manifest.created)
    return {
        "id": handler.name,
        "object": "model",
        "type": "model",
        "display_name": handler.name,
        "created": int(created.timestamp()),
        "created_at": created.isoformat(),
        "owned_by": handler.manifest.source.id.partition("/")[0],
        "context_length": handler.context_length,
        "max_new_tokens": handler.new_tokens,
        "role": handler.manifest.role,
        "state": model.described_state,
    }


async def _refuse_fields(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    error = describe_validation(exc.errors())
    request.app.state.service.metrics.rejected.labels(error.code or "invalid").inc()
    return JSONResponse(document_for(request.scope["path"], error), error.status)


async def _refuse_route(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    error = route_error(exc.status_code, request.scope["path"], request.method, exc.headers)
    return JSONResponse(document_for(request.scope["path"], error), error.status, headers=error.headers)


def describe_api(app: FastAPI, service: Service, keys: Keys) -> dict[str, Any]:
    """OpenAPI document of this server: models, limits, and whether a key is required."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    for name in _OTHER_REQUESTS:
        schemas[name]["properties"]["model"]["enum"] = list(service.models)
    for name in _REQUESTS:
        properties = schemas[name]["properties"]
        properties["model"]["enum"] = list(service.models)
        _bound(properties["n"], "maximum", service.limits.choices)
        if not any(model.handler.manifest.reasoning for model in service.models.values()):
            properties["max_reasoning_tokens"] = {"type": "null", "description": "No model here thinks aloud."}
    chat = schemas["ChatCompletionRequest"]
    _require_with(chat, "top_logprobs", {"type": "integer", "minimum": 1}, "logprobs")
    for name in _REQUESTS:
        _require_with(schemas[name], "stream_options", {"type": "object"}, "stream")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation.get("responses", {}).pop("422", None)  # FastAPI's own; here it is 400
            if keys and path.startswith(PROTECTED):
                operation["security"] = [{_SCHEME: []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keys:
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
    return document


def _require_with(schema: dict[str, Any], field: str, given: dict[str, Any], switch: str) -> None:
    """Declare that a field requires a switch to be true."""
    schema.setdefault("allOf", []).append(
        {
            "if": {"properties": {field: given}, "required": [field]},
            "then": {"properties": {switch: {"const": True}}, "required": [switch]},
        }
    )


def _bound(schema: dict[str, Any], name: str, value: int) -> None:
    for alternative in schema["anyOf"]:
        if alternative["type"] != "null":
            alternative[name] = value
