"""/v1/chat/completions: a conversation in, its next message out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from normistral.runtime.chunks import Chunk
from normistral.server.generation import Arrival
from normistral.server.served import ServedArtifact
from normistral.server.tally import Envelope, Tally, describe_token, finish_reason, shown_token


@dataclass(slots=True)
class _Answer:
    """One answer as far as it has come."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


async def gather_chat(
    arrivals: AsyncIterator[Arrival], envelope: Envelope, choices: int, *, logprobs: bool
) -> dict[str, Any]:
    """The whole answer of a request."""
    answers = [_Answer() for _ in range(choices)]
    tally = Tally(choices)
    async for index, chunk in arrivals:
        tally.add(index, chunk)
        answer = answers[index]
        answer.text.append(chunk.text)
        answer.reasoning.append(chunk.reasoning)
        answer.logprobs += _logprobs(envelope.served, chunk)
        answer.finish_reason = finish_reason(chunk.finish_reason)
    written = [_choice(index, answer, logprobs=logprobs) for index, answer in enumerate(answers)]
    return envelope.wrap("chat.completion", written, usage=tally.usage)


async def stream_chat(
    arrivals: AsyncIterator[Arrival], envelope: Envelope, choices: int, *, logprobs: bool, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Its events: a role, then what is added, then why it ended; with `usage` one more at the end."""
    kind, no_usage = "chat.completion.chunk", {"usage": None} if usage else {}
    tally = Tally(choices)
    begun: set[int] = set()
    async for index, chunk in arrivals:
        tally.add(index, chunk)
        deltas: list[dict[str, Any]] = []
        if index not in begun:
            begun.add(index)
            deltas.append({"role": "assistant", "content": ""})
        if chunk.reasoning:
            deltas.append({"reasoning_content": chunk.reasoning})
        described = _logprobs(envelope.served, chunk) if logprobs else []
        if chunk.text or described:
            deltas.append({"content": chunk.text})
        for delta in deltas:
            content = {"content": described} if described and delta is deltas[-1] else None
            yield envelope.wrap(kind, [_event(index, delta, content, None)], **no_usage)
        if chunk.finish_reason is not None:
            yield envelope.wrap(kind, [_event(index, {}, None, finish_reason(chunk.finish_reason))], **no_usage)
    if usage:
        yield envelope.wrap(kind, [], usage=tally.usage)


def _choice(index: int, answer: _Answer, *, logprobs: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(answer.text)}
    if reasoning := "".join(answer.reasoning):
        message["reasoning_content"] = reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": answer.logprobs} if logprobs else None,
        "finish_reason": answer.finish_reason,
    }


def _event(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(served: ServedArtifact, chunk: Chunk) -> list[dict[str, Any]]:
    token_id = shown_token(served, chunk)
    if token_id is None or chunk.logprob is None:
        return []
    top = [describe_token(served, *pair) for pair in chunk.top_logprobs]
    return [describe_token(served, token_id, chunk.logprob) | {"top_logprobs": top}]
