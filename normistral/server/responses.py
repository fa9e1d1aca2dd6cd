"""Response schemas of the API, routes of JSON bodies, token usage, and fields that all responses share."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

from normistral.runtime.chunks import Chunk, FinishReason
from normistral.runtime.overflow import LeftOut
from normistral.server.model_handler import ModelHandler

ApiFinishReason = Literal["stop", "length", "tool_calls"]
LEAST_LOGPROB = -9999.0  # as OpenAI writes what has no chance; JSON has no infinity

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


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


def error_responses(*statuses: int, model: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """How errors of these statuses look, for the description of the API."""
    return {status: {"model": model, "description": STATUSES[status]} for status in statuses}


class DecodedRequest(Request):
    """Request whose body the middleware has decoded; FastAPI would read one of another type as bytes."""

    def __init__(self, request: Request) -> None:
        others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
        headers = [*others, (b"content-type", b"application/json")]
        super().__init__({**request.scope, "headers": headers}, request.receive)

    async def json(self) -> Any:
        """The body."""
        return self.state.document


class DecodedRoute(APIRoute):
    """Route of a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, which would decode the body once more."""
        handle = super().get_route_handler()

        async def handle_decoded(request: Request) -> Response:
            return await handle(DecodedRequest(request))

        return handle_decoded


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of the answer's tokens, without those of the reasoning."""

    content: list[TokenLogprob]


class AnsweredFunction(BaseModel):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[AnsweredCall] | None = None
    reasoning_content: str | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ApiFinishReason


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Of the answers' tokens."""

    reasoning_tokens: int


class LeftOutCut(BaseModel):
    """Characters [start, end) of a message, counted from 0."""

    message: int
    start: int
    end: int


class LeftOutDetails(BaseModel):
    """What the prompt lacks of the conversation: tokens in all, the first and last message left out whole, and cuts."""

    tokens: int
    messages: list[int] | None
    cuts: list[LeftOutCut]


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    left_out: LeftOutDetails | None = Field(None, description="Only where `overflow` left something out.")


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """In parallel: tokens, what they had (null at the start of a prompt), what could have come, where they begin."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: ApiFinishReason
    reasoning_content: str | None = None


class TextCompletion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served; `type`, `display_name` and `created_at` are Anthropic's."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created: int
    created_at: str
    owned_by: str
    context_length: int
    max_new_tokens: int
    role: Literal["chat", "base"]
    state: Literal["unloaded", "loading", "loaded", "unloading", "failed"]


class ModelList(BaseModel):
    """Answer of /v1/models; a page that is all of them, as Anthropic's API has pages."""

    object: Literal["list"]
    data: list[ModelCard]
    has_more: Literal[False]
    first_id: str
    last_id: str


class Status(BaseModel):
    """Answer of /health and /ready."""

    status: str


@dataclass(slots=True)
class UsageCounter:
    """Tokens of a request with `choices` answers to each of its prompts.

    Attributes:
        choices: answers to one prompt; the prompt counts once for all of them.
        left_out: of the conversation.
    """

    choices: int
    left_out: LeftOut | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, index: int, chunk: Chunk) -> None:
        """Count a chunk of the answer `index`."""
        if chunk.token_id is not None and (chunk.reasoning or chunk.reasoning_open):
            self.reasoning_tokens += 1
        if chunk.finish_reason is not None:
            self.completion_tokens += chunk.timings.new_tokens
            if index % self.choices == 0:
                self.prompt_tokens += chunk.timings.prompt_tokens
                self.cached_tokens += chunk.timings.cached_tokens

    @property
    def usage(self) -> dict[str, Any]:
        """As the API writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        } | ({} if self.left_out is None else {"left_out": self.left_out.document()})


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """What every answer and event of a request begins with.

    Attributes:
        fingerprint: gives the `system_fingerprint`, once the model has begun to answer.
        left_out: of the conversation.
    """

    id: str
    handler: ModelHandler
    fingerprint: Callable[[], str | None]
    created: int = field(default_factory=lambda: int(time.time()))
    left_out: LeftOut | None = None

    def wrap(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer or event."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.handler.name,
            "system_fingerprint": self.fingerprint(),
            "choices": list(choices),
            **more,
        }


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words: a full context is a limit of length too."""
    return "length" if reason == "context" else reason


def describe_token(handler: ModelHandler, token_id: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability; bytes that are no whole character come out as U+FFFD in its text."""
    spelled = handler.token_bytes[token_id]
    text = spelled.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}


def shown_token(handler: ModelHandler, chunk: Chunk) -> int | None:
    """The token of a chunk if it belongs to the answer: not to the reasoning, and not the one that ends it."""
    if chunk.logprob is None or chunk.reasoning or chunk.reasoning_open:
        return None
    ended = chunk.finish_reason == "stop" and chunk.token_id in handler.manifest.stop_token_ids
    return None if ended else chunk.token_id
