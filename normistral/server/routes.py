"""The routes of the API."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from normistral.errors import ContextLengthError
from normistral.runtime.options import GenerationConfig
from normistral.server.completions import EchoedPrompt, gather_chat, gather_text, stream_chat, stream_text
from normistral.server.conversation import answer_whole, open_conversation, stream
from normistral.server.decoded import STATUSES, DecodedRoute, error_responses
from normistral.server.errors import ApiError
from normistral.server.model_handler import ModelHandler
from normistral.server.options import count_choices, read_options, require_stream_options
from normistral.server.responses import ChatCompletion, ResponseHeader, TextCompletion
from normistral.server.schemas import ChatCompletionRequest, CommonRequest, CompletionRequest
from normistral.server.service import Service

router = APIRouter(route_class=DecodedRoute)

Prepared = list[tuple[list[int], GenerationConfig]]

_EVENT = {
    "type": "object",
    "description": "With stream: true. The data of an event is a chunk of the answer as JSON, or an error; or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_ERRORS = error_responses(*STATUSES)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=_ERRORS | {200: {"model": ChatCompletion, "content": _STREAM, "description": "The answer."}},
)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answer a conversation."""
    asked = await open_conversation(request, body)
    model = asked.model
    header = ResponseHeader(
        f"chatcmpl-{asked.request_id}",
        model.handler,
        lambda: model.fingerprint(asked.config),
        left_out=asked.left_out,
    )
    logprobs, each = bool(body.logprobs), asked.choices
    if body.stream:
        usage = _wants_usage(body)
        return stream(asked.generation, stream_chat(asked.parts(), header, each, logprobs=logprobs, usage=usage))
    return await answer_whole(
        request, asked.generation, lambda: gather_chat(asked.parts(), header, each, logprobs=logprobs)
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
        outputs = generation.outputs()
        return stream(generation, stream_text(outputs, header, choices, each, echo, logprobs=logprobs, usage=usage))
    return await answer_whole(
        request,
        generation,
        lambda: gather_text(generation.outputs(), header, choices, each, echo, logprobs=logprobs),
    )


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
