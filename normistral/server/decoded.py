"""Routes whose body the middleware has decoded, and how the description of the API tells of their errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from normistral.server.responses import ErrorAnswer

STATUSES = {
    400: "The request is wrong, or does not fit.",
    401: "No API key, or an unknown one.",
    403: "The server is addressed under another name.",
    404: "No such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many answers are under way; Retry-After says when to ask again.",
    500: "The engine failed.",
    503: "No model is ready, or it took too long; Retry-After says when to ask again.",
}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "object"}}}


def error_responses(*statuses: int, model: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """How errors of these statuses look, for the description of the API."""
    return {status: {"model": model, "description": STATUSES[status]} for status in statuses}


class DecodedRequest(Request):
    """Request whose body the middleware has decoded."""

    async def json(self) -> Any:
        """The body."""
        return self.state.document


class DecodedRoute(APIRoute):
    """Route of a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, which would decode the body once more."""
        handle = super().get_route_handler()

        async def handle_decoded(request: Request) -> Response:
            return await handle(DecodedRequest(request.scope, request.receive))

        return handle_decoded
