"""From generated tokens to chunks of whole characters, one token at a time.

A `TextStream` tells reasoning from answer, and watches for stop texts and for the reasoning's budget. It does not know
what generates the tokens: the decode loop of the library, or an engine that answers many requests at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from normistral.runtime.chunks import Chunk, FinishReason, Timings, TokenLogprobs
from normistral.runtime.detokenizer import StreamDetokenizer
from normistral.runtime.reasoning import ReasoningBudget, ReasoningSplitter
from normistral.runtime.stopping import StopTexts


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token, or only a finish reason (token_id None) when none could be generated any more."""

    token_id: int | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    timings: Timings
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class TextStream:
    """The text of one generation."""

    def __init__(
        self,
        detokenizer: StreamDetokenizer,
        stop_texts: StopTexts,
        splitter: ReasoningSplitter,
        budget: ReasoningBudget,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_texts = stop_texts
        self._splitter = splitter
        self._budget = budget
        budget.watch(inside=splitter.inside)  # the prompt may have opened it

    def push(self, step: TokenStep) -> Chunk:
        """The chunk of one more token; it ends the generation early at a stop text, of which nothing is shown."""
        splitter, stop_texts = self._splitter, self._stop_texts
        token_id = None if step.finish_reason == "stop" else step.token_id  # a stop token is no text
        if token_id is None:
            text = ""
        elif splitter.is_tag(token_id):
            text = self._detokenizer.flush()  # no character goes across the border
        else:
            text = self._detokenizer.push(token_id)
        reasoning, answer = splitter.push(token_id, text)
        if self._budget.watch(inside=splitter.inside):
            reasoning += splitter.push(None, self._detokenizer.flush())[0]
        shown, stopped = stop_texts.push(answer)
        finish_reason = step.finish_reason
        if not stopped and finish_reason is not None:
            more_reasoning, rest = self._finish()
            reasoning += more_reasoning
            rest, stopped = stop_texts.push(rest)
            shown += rest if stopped else rest + stop_texts.flush()
        if stopped:
            finish_reason = "stop"
        return Chunk(
            shown,
            step.token_id,
            step.logprob,
            step.top_logprobs,
            finish_reason,
            step.timings,
            reasoning,
            splitter.inside,
            step.prompt_logprobs,
            stop_text=stop_texts.found,
        )

    def _finish(self) -> tuple[str, str]:
        """Reasoning and answer that detokenizer and splitter still hold."""
        reasoning, answer = self._splitter.push(None, self._detokenizer.flush())
        held_reasoning, held_answer = self._splitter.flush()
        return reasoning + held_reasoning, answer + held_answer
