"""OpenAI's /v1/chat/completions and /v1/completions: answers, whole and as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from normistral.errors import ContextLengthError
from normistral.runtime.chunks import Chunk
from normistral.runtime.options import GenerationConfig
from normistral.runtime.tools import CallDelta
from normistral.server.conversation import AnswerPart, ChatAnswer, answer_whole, open_conversation, stream
from normistral.server.errors import ApiError
from normistral.server.generation import SequenceOutput
from normistral.server.model_handler import ModelHandler
from normistral.server.options import count_choices, read_options
from normistral.server.responses import (
    STATUSES,
    ChatCompletion,
    DecodedRoute,
    ResponseHeader,
    TextCompletion,
    UsageCounter,
    describe_token,
    error_responses,
    finish_reason,
    shown_token,
)
from normistral.server.schemas import ChatCompletionRequest, CommonRequest, CompletionRequest
from normistral.server.service import Service

_KIND = "text_completion"
router = APIRouter(route_class=DecodedRoute)

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
        return stream(asked.generation, _stream_chat(asked.parts(), header, each, logprobs=logprobs, usage=usage))
    return await answer_whole(request, asked.generation, lambda: _gather_chat(asked.parts(), header, each, logprobs))


@router.post(
    "/v1/completions",
    response_model=None,
    responses=_ERRORS | {200: {"model": TextCompletion, "content": _STREAM, "description": "The answer."}},
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Complete a text, without a chat template."""
    service: Service = request.app.state.service
    model = service.find(body.model)
    choices = count_choices(body, len(body.prompts), service.limits)
    each = choices // len(body.prompts)
    prompts = await service.prepare(model, choices, request, _prepare_text, model.handler, body)
    header = ResponseHeader(f"cmpl-{request.state.request_id}", model.handler, lambda: model.fingerprint(prompts[0][1]))
    logprobs, usage = body.logprobs is not None, _wants_usage(body)
    answers = [
        _TextAnswer(model.handler, prompt_ids if body.echo else None) for prompt_ids, _ in prompts for _ in range(each)
    ]
    generation = service.generation(model, prompts, each, request.state)
    outputs = generation.outputs()
    if body.stream:
        return stream(generation, _stream_text(outputs, header, answers, each, logprobs=logprobs, usage=usage))
    return await answer_whole(request, generation, lambda: _gather_text(outputs, header, answers, each, logprobs))


def _prepare_text(handler: ModelHandler, body: CompletionRequest) -> list[tuple[list[int], GenerationConfig]]:
    options = read_options(body)
    try:
        encoded = [handler.encode_text(prompt) for prompt in body.prompts]
    except ContextLengthError as error:
        raise ApiError(400, error.message, error.hint, param="prompt", code="context_length_exceeded") from None
    return [(prompt_ids, handler.resolve(options, len(prompt_ids))) for prompt_ids in encoded]


def _wants_usage(body: CommonRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


@dataclass(slots=True)
class _TextAnswer:
    """Text completion so far; `length` in characters, `echo` the tokens of a prompt that is still to be repeated."""

    handler: ModelHandler
    echo: Sequence[int] | None
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: _no_logprobs())
    length: int = 0
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> tuple[str, dict[str, list[Any]]]:
        """Append a chunk; returns what it adds to the text and its log-probabilities, an echoed prompt before both."""
        text, described = chunk.text, _no_logprobs()
        if self.echo is not None:
            offset = 0
            if chunk.prompt_logprobs:
                for token_id, (logprob, top) in zip(self.echo, chunk.prompt_logprobs, strict=True):
                    offset += _add_token(described, self.handler, token_id, logprob, top, offset)
            prompt = self.handler.tokenizer.decode(self.echo, skip_special_tokens=False)
            text, self.length, self.echo = prompt + text, len(prompt), None
        token = shown_token(self.handler, chunk)
        if token is not None and chunk.logprob is not None:
            _add_token(described, self.handler, token, chunk.logprob, chunk.top_logprobs, self.length)
        for name, values in described.items():
            self.logprobs[name] += values
        self.text.append(text)
        self.reasoning.append(chunk.reasoning)
        self.length += len(chunk.text)
        self.finish_reason = finish_reason(chunk.finish_reason)
        return text, described


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _add_token(
    lists: dict[str, list[Any]],
    handler: ModelHandler,
    token_id: int,
    logprob: float | None,
    top: Sequence[tuple[int, float]],
    offset: int,
) -> int:
    """Append a token to parallel lists; returns the length of its text in characters.

    Args:
        logprob: None, as of the first token of a prompt, is written as null.
        offset: first character of its text.
    """
    token = describe_token(handler, token_id, logprob or 0.0)
    likely = [describe_token(handler, *pair) for pair in top]
    lists["tokens"].append(token["token"])
    lists["token_logprobs"].append(None if logprob is None else token["logprob"])
    lists["top_logprobs"].append(None if logprob is None else {one["token"]: one["logprob"] for one in likely})
    lists["text_offset"].append(offset)
    return len(token["token"])


async def _gather_text(
    outputs: AsyncIterator[SequenceOutput],
    header: ResponseHeader,
    answers: Sequence[_TextAnswer],
    each: int,
    logprobs: bool,
) -> dict[str, Any]:
    """Response body of /v1/completions; `each` of the answers belong to one prompt."""
    counter = UsageCounter(each)
    async for index, chunk in outputs:
        counter.add(index, chunk)
        answers[index].add(chunk)
    written = [
        _text_choice(
            index,
            "".join(answer.text),
            "".join(answer.reasoning),
            answer.logprobs if logprobs else None,
            answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return header.wrap(_KIND, written, usage=counter.usage)


async def _stream_text(
    outputs: AsyncIterator[SequenceOutput],
    header: ResponseHeader,
    answers: Sequence[_TextAnswer],
    each: int,
    *,
    logprobs: bool,
    usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """Stream events of /v1/completions: text deltas, the last with a finish reason; `usage` adds a final event."""
    no_usage = {"usage": None} if usage else {}
    counter = UsageCounter(each)
    async for index, chunk in outputs:
        counter.add(index, chunk)
        text, described = answers[index].add(chunk)
        told = described if logprobs and described["tokens"] else None
        reason = finish_reason(chunk.finish_reason)
        if text or chunk.reasoning or told or reason:
            yield header.wrap(_KIND, [_text_choice(index, text, chunk.reasoning, told, reason)], **no_usage)
    if usage:
        yield header.wrap(_KIND, [], usage=counter.usage)


def _text_choice(
    index: int, text: str, reasoning: str, logprobs: dict[str, list[Any]] | None, reason: str | None
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
    return choice | {"reasoning_content": reasoning} if reasoning else choice


async def _gather_chat(
    parts: AsyncIterator[AnswerPart], header: ResponseHeader, choices: int, logprobs: bool
) -> dict[str, Any]:
    """Response body of /v1/chat/completions."""
    answers = [ChatAnswer() for _ in range(choices)]
    counter = UsageCounter(choices, header.left_out)
    async for part in parts:
        counter.add(part.choice, part.chunk)
        answers[part.choice].add(part)
    written = [
        _chat_choice(index, answer, _chat_logprobs(header.handler, answer.chunks) if logprobs else None)
        for index, answer in enumerate(answers)
    ]
    return header.wrap("chat.completion", written, usage=counter.usage)


async def _stream_chat(
    parts: AsyncIterator[AnswerPart], header: ResponseHeader, choices: int, *, logprobs: bool, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Stream events of /v1/chat/completions: role, deltas, finish reason; `usage` adds a final event."""
    kind, no_usage = "chat.completion.chunk", {"usage": None} if usage else {}
    counter = UsageCounter(choices, header.left_out)
    begun: set[int] = set()
    async for part in parts:
        index, chunk = part.choice, part.chunk
        counter.add(index, chunk)
        deltas: list[dict[str, Any]] = []
        if index not in begun:
            begun.add(index)
            deltas.append({"role": "assistant", "content": ""})
        if chunk.reasoning:
            deltas.append({"reasoning_content": chunk.reasoning})
        described = _chat_logprobs(header.handler, part.chunks) if logprobs else []
        if part.text or described:
            deltas.append({"content": part.text})
        for delta in deltas:
            content = {"content": described} if described and delta is deltas[-1] else None
            yield header.wrap(kind, [_chat_event(index, delta, content, None)], **no_usage)
        for call in part.calls:
            yield header.wrap(kind, [_chat_event(index, {"tool_calls": [_call_delta(call)]}, None, None)], **no_usage)
        if part.finish_reason is not None:
            yield header.wrap(kind, [_chat_event(index, {}, None, part.finish_reason)], **no_usage)
    if usage:
        yield header.wrap(kind, [], usage=counter.usage)


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _chat_choice(index: int, answer: ChatAnswer, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None if answer.calls else answer.text}
    if answer.calls:
        message["tool_calls"] = [call.as_message for call in answer.calls]
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": None if logprobs is None else {"content": logprobs},
        "finish_reason": answer.finish_reason,
    }


def _chat_event(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprobs(handler: ModelHandler, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    return [
        describe_token(handler, token_id, chunk.logprob)
        | {"top_logprobs": [describe_token(handler, *pair) for pair in chunk.top_logprobs]}
        for chunk in chunks
        if (token_id := shown_token(handler, chunk)) is not None and chunk.logprob is not None
    ]
