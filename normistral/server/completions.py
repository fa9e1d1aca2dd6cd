"""/v1/completions: a text in, how it goes on out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from normistral.runtime.chunks import Chunk
from normistral.server.generation import Arrival
from normistral.server.served import ServedArtifact
from normistral.server.tally import Envelope, Tally, describe_token, finish_reason, shown_token

_KIND = "text_completion"


@dataclass(slots=True)
class _Answer:
    """One answer as far as it has come; `length` in characters."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=lambda: _no_logprobs())
    length: int = 0
    finish_reason: str | None = None

    def add(self, served: ServedArtifact, chunk: Chunk) -> dict[str, list[Any]]:
        """Append a chunk; returns the log-probabilities in it."""
        described = _logprobs(served, chunk, self.length)
        for name, values in described.items():
            self.logprobs[name] += values
        self.text.append(chunk.text)
        self.reasoning.append(chunk.reasoning)
        self.length += len(chunk.text)
        self.finish_reason = finish_reason(chunk.finish_reason)
        return described


async def gather_text(
    arrivals: AsyncIterator[Arrival], envelope: Envelope, choices: int, each: int, *, logprobs: bool
) -> dict[str, Any]:
    """The whole answer of a request; `each` of the `choices` belong to one prompt."""
    answers = [_Answer() for _ in range(choices)]
    tally = Tally(each)
    async for index, chunk in arrivals:
        tally.add(index, chunk)
        answers[index].add(envelope.served, chunk)
    written = [
        _choice(
            index,
            "".join(answer.text),
            "".join(answer.reasoning),
            answer.logprobs if logprobs else None,
            answer.finish_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return envelope.wrap(_KIND, written, usage=tally.usage)


async def stream_text(
    arrivals: AsyncIterator[Arrival], envelope: Envelope, choices: int, each: int, *, logprobs: bool, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Its events: what is added, and with the last of an answer why it ended; with `usage` one more at the end."""
    no_usage = {"usage": None} if usage else {}
    answers = [_Answer() for _ in range(choices)]
    tally = Tally(each)
    async for index, chunk in arrivals:
        tally.add(index, chunk)
        described = answers[index].add(envelope.served, chunk)
        told = described if logprobs and described["tokens"] else None
        reason = finish_reason(chunk.finish_reason)
        if chunk.text or chunk.reasoning or told or reason:
            yield envelope.wrap(_KIND, [_choice(index, chunk.text, chunk.reasoning, told, reason)], **no_usage)
    if usage:
        yield envelope.wrap(_KIND, [], usage=tally.usage)


def _choice(
    index: int, text: str, reasoning: str, logprobs: dict[str, list[Any]] | None, reason: str | None
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
    return choice | {"reasoning_content": reasoning} if reasoning else choice


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _logprobs(served: ServedArtifact, chunk: Chunk, offset: int) -> dict[str, list[Any]]:
    """Parallel lists for the chunk's token; `offset` is where its text begins."""
    token_id = shown_token(served, chunk)
    if token_id is None or chunk.logprob is None:
        return _no_logprobs()
    token = describe_token(served, token_id, chunk.logprob)
    top = [describe_token(served, *pair) for pair in chunk.top_logprobs]
    return {
        "tokens": [token["token"]],
        "token_logprobs": [token["logprob"]],
        "top_logprobs": [{one["token"]: one["logprob"] for one in top}],
        "text_offset": [offset],
    }
