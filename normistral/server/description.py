"""The OpenAPI description with what only this server knows: its models, its limits, whether it wants a key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from normistral.server.auth import Keys
from normistral.server.service import Service

_REQUESTS = ("ChatCompletionRequest", "CompletionRequest")
_SCHEME = "key"


def describe_api(app: FastAPI, service: Service, keys: Keys) -> dict[str, Any]:
    """The description that /openapi.json gives."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    for name in _REQUESTS:
        properties = schemas[name]["properties"]
        properties["model"]["enum"] = list(service.models)
        _bound(properties["n"], "maximum", service.limits.choices)
        if not any(model.served.manifest.reasoning for model in service.models.values()):
            properties["max_reasoning_tokens"] = {"type": "null", "description": "No model here thinks aloud."}
    chat = schemas["ChatCompletionRequest"]
    _require_with(chat, "top_logprobs", {"type": "integer", "minimum": 1}, "logprobs")
    for name in _REQUESTS:
        _require_with(schemas[name], "stream_options", {"type": "object"}, "stream")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation.get("responses", {}).pop("422", None)  # FastAPI's own; here it is 400
            if keys and path.startswith(("/v1/", "/metrics")):
                operation["security"] = [{_SCHEME: []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keys:
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
    return document


def _require_with(schema: dict[str, Any], field: str, given: dict[str, Any], switch: str) -> None:
    """Say that a field asks for another one that is true."""
    schema.setdefault("allOf", []).append(
        {
            "if": {"properties": {field: given}, "required": [field]},
            "then": {"properties": {switch: {"const": True}}, "required": [switch]},
        }
    )


def _bound(schema: dict[str, Any], name: str, value: int) -> None:
    """Set a bound of a number that may be null."""
    for alternative in schema["anyOf"]:
        if alternative["type"] != "null":
            alternative[name] = value
