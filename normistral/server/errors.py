"""Errors in OpenAI's format, {"error": {"message", "type", "param", "code"}}, with HTTP status codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from normistral.errors import ContextLengthError, NormistralError, TemplateError, UsageError
from normistral.server.limits import ServerLimits

_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_SERVER_ERROR = 500
JSON_PATHS = (  # routes with a body; a longer one comes before one that it ends with
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/api/show",
)
_LISTS = ("/v1/models", "/api/tags")
_UNKNOWN = "extra_forbidden"
_ALTERNATIVES = frozenset(("body", "str", "int", "float", "bool"))  # steps of a path that are types and no fields


class ApiError(NormistralError):
    """HTTP error response.

    Args:
        status: HTTP status code.
        param: invalid field.
        code: error code for programs.
        retry_after_s: value of the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        hint: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.status, self.param = status, param
        self.code = code or _CODES.get(status)
        self.headers = headers or {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def __str__(self) -> str:
        return self.message if not self.hint else f"{self.message} ({self.hint})"

    @property
    def document(self) -> dict[str, Any]:
        """Response body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def document_for(path: str, error: ApiError) -> dict[str, Any]:
    """Response body of an error in the format of the API that a path belongs to."""
    if path.startswith("/api/"):
        return {"error": str(error)}
    return anthropic_document(error) if path.startswith("/v1/messages") else error.document


def anthropic_document(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's API writes it."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < _SERVER_ERROR else "api_error")
    details = {} if error.code is None else {"details": {"error_code": error.code}}
    return {"type": "error", "error": {"type": kind, "message": str(error), **details}}


def unavailable(message: str, hint: str = "", *, code: str = "unavailable", retry_after_s: float = 5) -> ApiError:
    """503 with Retry-After."""
    return ApiError(503, message, hint, code=code, retry_after_s=retry_after_s)


def bug_error(bug: BaseException) -> ApiError:
    """500: an exception that nobody expected. Not its words: they could quote a prompt."""
    return ApiError(500, "this is a bug in normistral", f"report {type(bug).__name__}", code="bug")


def header_too_large(limits: ServerLimits) -> ApiError:
    """431: headers over the limit."""
    message = f"the headers have more than {limits.header_bytes} bytes"
    return ApiError(431, message, "send less", code="header_too_large")


def too_many_connections() -> ApiError:
    """503: the limit of connections is reached."""
    return unavailable("too many connections", "ask again later", code="connections")


def route_error(status: int, path: str, method: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """404, 405 and other statuses of the router."""
    messages = {404: f"there is no {path} here", 405: f"{method} is not possible here"}
    message = messages.get(status, "the request cannot be read")
    meant = _meant(path) if status == 404 else None
    hint = "see /openapi.json" if meant is None else f"it is {meant}: look at the client's base URL"
    return ApiError(status, message, hint, headers=dict(headers or {}))


def _meant(path: str) -> str | None:
    """The route that a client with another base URL looks for."""
    tails = {route.removeprefix("/v1"): route for route in (*JSON_PATHS, *_LISTS)}
    return next((route for tail, route in tails.items() if path.rstrip("/").endswith(tail)), None)


def as_api_error(error: NormistralError) -> ApiError:
    """Map an error of the package to a status: 400 for usage errors, 500 for engine errors."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, error.message, error.hint, param="messages", code="context_length_exceeded")
    if isinstance(error, (UsageError, TemplateError)):
        return ApiError(400, error.message, error.hint)
    return ApiError(500, error.message, error.hint, code=type(error).__name__)


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """The most specific validation error; never quotes the request.

    Where a field has several types there is an error for each: one about a value says more than one about its type.
    """
    error = min(errors, key=lambda one: (one["type"] != _UNKNOWN, one["type"].endswith("_type"), -len(one["loc"])))
    param = ".".join(_place(error["loc"])) or None
    if error["type"] == _UNKNOWN:
        return ApiError(400, f"unknown field {param}", "see /openapi.json", param=param, code="unknown_field")
    reason = error["msg"].removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return ApiError(400, message, param=param, code="invalid_value")


def _place(loc: Sequence[Any]) -> list[str]:
    """The path to a field, without the names that pydantic gives to alternatives of a type."""
    return [
        str(step)
        for step in loc
        if isinstance(step, int) or (step not in _ALTERNATIVES and str(step).isidentifier() and str(step).islower())
    ]
