"""Response bodies and stream events of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from normistral.runtime.chunks import Chunk, TokenLogprobs
from normistral.runtime.tools import CallDelta
from normistral.server.answers import AnswerPart, ChatAnswer
from normistral.server.generation import SequenceOutput
from normistral.server.model_handler import ModelHandler
from normistral.server.responses import (
    LEAST_LOGPROB,
    ResponseHeader,
    UsageCounter,
    describe_token,
    finish_reason,
    shown_token,
)

_KIND = "text_completion"


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt before its answer."""

    handler: ModelHandler
    token_ids: Sequence[int]

    @property
    def text(self) -> str:
        """As it is decoded; control tokens are written out."""
        return self.handler.tokenizer.decode(self.token_ids, skip_special_tokens=False)

    def logprobs(self, scored: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Parallel lists for its tokens; those of the first are null."""
        lists, offset = _no_logprobs(), 0
        for token_id, (logprob, top) in zip(self.token_ids, scored, strict=True):
            token = describe_token(self.handler, token_id, 0.0)["token"]
            likely = [describe_token(self.handler, *pair) for pair in top]
            lists["tokens"].append(token)
            lists["token_logprobs"].append(None if logprob is None else max(logprob, LEAST_LOGPROB))
            lists["top_logprobs"].append(None if logprob is None else {one["token"]: one["logprob"] for one in likely})
            lists["text_offset"].append(offset)
            offset += len(token)
        return lists


@dataclass(slots=True)
class _TextAnswer:
    """Text completion so far; `length` in characters."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: _no_logprobs())
    length: int = 0
    finish_reason: str | None = None
    echo: EchoedPrompt | None = None

    def add(self, handler: ModelHandler, chunk: Chunk) -> tuple[str, dict[str, list[Any]]]:
        """Append a chunk; returns what it adds to the text and its log-probabilities, an echoed prompt before both."""
        text, described = chunk.text, _no_logprobs()
        if self.echo is not None:
            text = self.echo.text + text
            self.length = len(self.echo.text)
            if chunk.prompt_logprobs:
                described = self.echo.logprobs(chunk.prompt_logprobs)
            self.echo = None
        for name, values in _text_logprobs(handler, chunk, self.length).items():
            described[name] += values
        for name, values in described.items():
            self.logprobs[name] += values
        self.text.append(text)
        self.reasoning.append(chunk.reasoning)
        self.length += len(chunk.text)
        self.finish_reason = finish_reason(chunk.finish_reason)
        return text, described


async def gather_text(
    outputs: AsyncIterator[SequenceOutput],
    header: ResponseHeader,
    choices: int,
    each: int,
    echo: Sequence[EchoedPrompt],
    *,
    logprobs: bool,
) -> dict[str, Any]:
    """Response body of /v1/completions; `each` of the `choices` belong to one prompt, which `echo` repeats."""
    answers = [_TextAnswer(echo=echo[index // each] if echo else None) for index in range(choices)]
    counter = UsageCounter(each)
    async for index, chunk in outputs:
        counter.add(index, chunk)
        answers[index].add(header.handler, chunk)
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


async def stream_text(
    outputs: AsyncIterator[SequenceOutput],
    header: ResponseHeader,
    choices: int,
    each: int,
    echo: Sequence[EchoedPrompt],
    *,
    logprobs: bool,
    usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """Stream events of /v1/completions: text deltas, the last with a finish reason; `usage` adds a final event."""
    no_usage = {"usage": None} if usage else {}
    answers = [_TextAnswer(echo=echo[index // each] if echo else None) for index in range(choices)]
    counter = UsageCounter(each)
    async for index, chunk in outputs:
        counter.add(index, chunk)
        text, described = answers[index].add(header.handler, chunk)
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


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _text_logprobs(handler: ModelHandler, chunk: Chunk, offset: int) -> dict[str, list[Any]]:
    """Parallel lists for the chunk's token; `offset` is the first character of its text."""
    token_id = shown_token(handler, chunk)
    if token_id is None or chunk.logprob is None:
        return _no_logprobs()
    token = describe_token(handler, token_id, chunk.logprob)
    top = [describe_token(handler, *pair) for pair in chunk.top_logprobs]
    return {
        "tokens": [token["token"]],
        "token_logprobs": [token["logprob"]],
        "top_logprobs": [{one["token"]: one["logprob"] for one in top}],
        "text_offset": [offset],
    }


async def gather_chat(
    parts: AsyncIterator[AnswerPart], header: ResponseHeader, choices: int, *, logprobs: bool
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


async def stream_chat(
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
