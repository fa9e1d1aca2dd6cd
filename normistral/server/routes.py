"""The routes of the API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import closing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from normistral.errors import ContextLengthError
from normistral.runtime.options import GenerationConfig
from normistral.server.answers import make_parsers, prepare_chat, read_parts
from normistral.server.completions import EchoedPrompt, gather_chat, gather_text, stream_chat, stream_text
from normistral.server.errors import ApiError
from normistral.server.generation import Events, EventStream, Generation, SequenceOutput, unless_gone
from normistral.server.model_handler import ModelHandler
from normistral.server.options import count_choices, read_options, require_stream_options
from normistral.server.responses import ChatCompletion, ErrorAnswer, ResponseHeader, TextCompletion
from normistral.server.schemas import ChatCompletionRequest, CommonRequest, CompletionRequest
from normistral.server.service import Service


class _DecodedRequest(Request):
    """Request whose body the middleware has decoded."""

    async def json(self) -> Any:
        """The body."""
        return self.state.document


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, which would decode the body once more."""
        handle = super().get_route_handler()

        async def handle_decoded(request: Request) -> Response:
            return await handle(_DecodedRequest(request.scope, request.receive))

        return handle_decoded


router = APIRouter(route_class=_Route)

Prepared = list[tuple[list[int], GenerationConfig]]
SequenceOutputs = AsyncIterator[SequenceOutput]
Document = Coroutine[Any, Any, dict[str, Any]]

_EVENT = {
    "type": "object",
    "description": "With stream: true. The data of an event is a chunk of the answer as JSON, or an error; or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_STATUSES = {
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


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How errors of these statuses look, for the description of the API."""
    return {status: {"model": ErrorAnswer, "description": _STATUSES[status]} for status in statuses}


_ERRORS = error_responses(*_STATUSES)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=_ERRORS | {200: {"model": ChatCompletion, "content": _STREAM, "description": "The answer."}},
)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    model = service.find(body.model)
    each = _check(body, 1, service)
    if body.continue_final_message and (body.add_generation_prompt or body.messages[-1].role != "assistant"):
        message = "continue_final_message goes on inside a last message of the assistant"
        raise ApiError(400, message, "leave add_generation_prompt out", param="continue_final_message")
    prompts = await service.prepare(model, each, request, prepare_chat, model.handler, body)
    header = ResponseHeader(
        f"chatcmpl-{request.state.request_id}", model.handler, lambda: model.fingerprint(prompts[0][1])
    )
    logprobs, usage = bool(body.logprobs), _wants_usage(body)
    parsers = make_parsers(model.handler, body, each)
    generation = service.generation(model, prompts, each, request.state)
    if body.stream:
        return _stream(
            generation,
            lambda a: stream_chat(read_parts(a, parsers), header, each, logprobs=logprobs, usage=usage),
        )
    return await _whole(
        request, generation, lambda a: gather_chat(read_parts(a, parsers), header, each, logprobs=logprobs)
    )


@router.post(
    "/v1/completions",
    response_model=None,
    responses=_ERRORS | {200: {"model": TextCompletion, "content": _STREAM, "description": "The answer."}},
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Complete a text, without a chat template."""
    service: Service = request.app.state.service
    model = service.find(body.model)
    choices = _check(body, len(body.prompts), service)
    each = choices // len(body.prompts)
    prompts = await service.prepare(model, choices, request, _prepare_text, model.handler, body)
    header = ResponseHeader(f"cmpl-{request.state.request_id}", model.handler, lambda: model.fingerprint(prompts[0][1]))
    logprobs, usage = body.logprobs is not None, _wants_usage(body)
    echo = [EchoedPrompt(model.handler, prompt_ids) for prompt_ids, _ in prompts] if body.echo else []
    generation = service.generation(model, prompts, each, request.state)
    if body.stream:
        return _stream(
            generation, lambda a: stream_text(a, header, choices, each, echo, logprobs=logprobs, usage=usage)
        )
    return await _whole(request, generation, lambda a: gather_text(a, header, choices, each, echo, logprobs=logprobs))


def _check(body: CommonRequest, prompts: int, service: Service) -> int:
    require_stream_options(body)
    return count_choices(body, prompts, service.limits)


def _prepare_text(handler: ModelHandler, body: CompletionRequest) -> Prepared:
    options = read_options(body)
    try:
        encoded = [handler.encode_text(prompt) for prompt in body.prompts]
    except ContextLengthError as error:
        raise ApiError(400, error.message, error.hint, param="prompt", code="context_length_exceeded") from None
    return [(prompt_ids, handler.resolve(options, len(prompt_ids))) for prompt_ids in encoded]


def _wants_usage(body: CommonRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _stream(generation: Generation, make_events: Callable[[SequenceOutputs], Events]) -> Response:
    generation.begin()
    return EventStream(make_events(generation.outputs()), generation.close)


async def _whole(request: Request, generation: Generation, gather: Callable[[SequenceOutputs], Document]) -> Response:
    with closing(generation):
        generation.begin()
        document = await unless_gone(gather(generation.outputs()), request.receive)
    return Response(msgspec.json.encode(document), media_type="application/json")
