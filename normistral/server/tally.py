"""What one request has come to: the usage, and how its parts are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from normistral.runtime.chunks import Chunk, FinishReason
from normistral.server.served import ServedArtifact

_LEAST_LOGPROB = -9999.0  # as OpenAI writes what has no chance; JSON has no infinity


@dataclass(slots=True)
class Tally:
    """Tokens of a request with `choices` answers to each of its prompts.

    Attributes:
        choices: answers to one prompt; the prompt counts once for all of them.
    """

    choices: int
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
        }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer and event of a request begins with.

    Attributes:
        fingerprint: gives the `system_fingerprint`, once the model has begun to answer.
    """

    id: str
    served: ServedArtifact
    fingerprint: Callable[[], str | None]
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer or event."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.fingerprint(),
            "choices": list(choices),
            **more,
        }


def finish_reason(reason: FinishReason | None) -> str | None:
    """In OpenAI's words: a full context is a limit of length too."""
    return "length" if reason == "context" else reason


def describe_token(served: ServedArtifact, token_id: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability; bytes that are no whole character come out as U+FFFD in its text."""
    spelled = served.token_bytes[token_id]
    text = spelled.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(spelled)}


def shown_token(served: ServedArtifact, chunk: Chunk) -> int | None:
    """The token of a chunk if it belongs to the answer: not to the reasoning, and not the one that ends it."""
    if chunk.logprob is None or chunk.reasoning or chunk.reasoning_open:
        return None
    ended = chunk.finish_reason == "stop" and chunk.token_id in served.manifest.stop_token_ids
    return None if ended else chunk.token_id
