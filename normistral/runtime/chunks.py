"""Results of a generation: chunks while it runs, a completion at the end.

Chunks carry everything that a terminal, an application or a benchmark needs; nothing else is measured elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from normistral.errors import UsageError

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""stop: a stop token or stop text; length: max_new_tokens; context: the model's context is full; cancelled."""


TokenLogprobs = tuple[float | None, tuple[tuple[int, float], ...]]
"""Log-probability of a token, and (token id, log-probability) of the most likely ones in its place."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of one generation up to this chunk, in seconds from the call (load is not in them).

    Attributes:
        prompt_tokens: tokens of the input.
        cached_tokens: of these, how many were still in the KV cache and not computed again.
        prefill_s: computing the others.
        ttft_s: time to first token.
        new_tokens: tokens generated so far, a final stop token included.
        decode_s: from the first token to this one.
        drafted_tokens: tokens that were guessed and given to the model to check (docs/drafting.md).
        accepted_tokens: of these, how many were right; each saved a step.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    ttft_s: float
    new_tokens: int
    decode_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed after the first token; 0 while there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote.

    Attributes:
        id: names it in the conversation.
        arguments: JSON text that fits the tool's schema, unless the answer was cut off within it.
    """

    id: str
    name: str
    arguments: str

    def parse(self) -> dict[str, Any]:
        """The arguments as an object; raises UsageError where the answer was cut off within them."""
        try:
            arguments: dict[str, Any] = json.loads(self.arguments)
        except ValueError as exc:
            raise UsageError("the call was cut off", "raise max_new_tokens") from exc
        return arguments

    @property
    def is_whole(self) -> bool:
        """It was not cut off."""
        return self.arguments.endswith("}") and _is_json(self.arguments)

    @property
    def as_message(self) -> dict[str, Any]:
        """As messages hold it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a generation.

    Attributes:
        text: whole characters of the answer that became certain with this token; may be empty, or hold those of several
            tokens.
        token_id: the token of this step; None on a last chunk that only flushes text or says why it ended.
        logprob: log-probability (nats) of the token under the model, when asked for.
        top_logprobs: (token id, log-probability) of the most likely tokens, best first, when asked for.
        finish_reason: None until the last chunk.
        timings: up to and including this step.
        reasoning: as `text`, of what a thinking model writes before it answers; without the tags around it.
        reasoning_open: whether the reasoning had begun and not ended after this token.
        prompt_logprobs: of each token of the prompt, its log-probability (the first has none) and the most likely
            tokens in its place, when asked for; only the first chunk has them.
        tool_calls: of a chat with tools: the calls of the answer, on its last chunk.
        stop_text: that ended the answer, on its last chunk; None if none did.
    """

    text: str
    token_id: int | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    timings: Timings
    reasoning: str = ""
    reasoning_open: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    stop_text: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation; fields as in `Chunk`. `token_ids` and `logprobs` run in parallel.

    With `reasoning_open` it ended before the reasoning did, so there is nothing of the answer, or not all of it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[float, ...] = ()
    reasoning: str = ""
    reasoning_open: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    stop_text: str | None = None

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk]) -> Completion:
        """Gather all chunks of one generation; there is always at least one, and the last has a finish reason."""
        gathered = list(chunks)
        last = gathered[-1]
        assert last.finish_reason is not None
        return cls(
            text="".join(chunk.text for chunk in gathered),
            token_ids=tuple(chunk.token_id for chunk in gathered if chunk.token_id is not None),
            finish_reason=last.finish_reason,
            timings=last.timings,
            logprobs=tuple(chunk.logprob for chunk in gathered if chunk.logprob is not None),
            reasoning="".join(chunk.reasoning for chunk in gathered),
            reasoning_open=last.reasoning_open,
            prompt_logprobs=gathered[0].prompt_logprobs,
            tool_calls=last.tool_calls,
            stop_text=last.stop_text,
        )
