"""The decode loop, one for all engines.

Two layers: `generate_tokens` goes from token ids to token ids and never sees text; `stream_text` turns its steps into
chunks by way of a `TextStream`. When the reasoning's budget is used up, that puts the close tag's ids into a queue, and
the token layer takes those before it samples again. A structure acts on the token layer: it masks what may not follow,
and dictates what has to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from normistral.runtime.chunks import Chunk, FinishReason, Timings, TokenLogprobs
from normistral.runtime.engines.base import Logits
from normistral.runtime.options import GenerationConfig
from normistral.runtime.sampling import Sampler, log_softmax
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.speculative.decoder import Decoder
from normistral.runtime.speculative.draft_length import MOST_DRAFTED
from normistral.runtime.structured.constraint import Constraint
from normistral.runtime.text_stream import TextStream, TokenStep


@dataclass(frozen=True, slots=True)
class Limits:
    """Ends of a generation besides its options.

    Attributes:
        stop_token_ids: the model's own ends of sequence.
        context_length: the most tokens that prompt and answer may take together.
        cancelled: asked before every forward.
    """

    stop_token_ids: Collection[int]
    context_length: int
    cancelled: Callable[[], bool]


def generate_tokens(
    sequence: CachedSequence,
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    limits: Limits,
    forced: deque[int],
    decoder: Decoder,
    constraint: Constraint | None = None,
) -> Iterator[TokenStep]:
    """Prefill the prompt, then sample and feed one token at a time until something ends it.

    Ids in `forced`, which may be added between two steps, are taken from its front instead of sampled ones.
    The prompt must hold at least one token and leave room for one in the context. The last step, and only it, has a
    finish reason. A sampled token is fed when the next one is needed, so the last one is never in the cache. What the
    `decoder` of the sequence feeds with it is its own affair: its logits are those after the token. (Drafts that it fed
    may stay in the cache of a generation that is left early; the next prefill cuts them off.)

    With a `constraint` only what it allows is sampled. What it dictates is not sampled at all, and fed together. When
    it is complete, a step without a token says so.
    """
    clock = _Clock(len(prompt_ids), decoder)
    sequence.require_batch_invariance(config.reproducible)
    sampler = Sampler(config, prompt_ids)
    of_prompt: tuple[TokenLogprobs, ...] = ()
    logits: Logits | None
    if config.prompt_logprobs is None:
        clock.cached_tokens = sequence.reuse(prompt_ids, reproducible=config.reproducible)
        logits = sequence.prefill(prompt_ids, limits.cancelled, reproducible=config.reproducible)
    else:
        logits, of_prompt = score_prompt(sequence, prompt_ids, config.prompt_logprobs, limits.cancelled)
    clock.prefilled()
    jump_forward: deque[int] = deque(constraint.jump_forward_tokens() if constraint is not None else ())
    room = min(config.max_new_tokens, limits.context_length - len(prompt_ids))
    for generated in range(1, room + 1):
        if logits is None or limits.cancelled():
            decoder.rollback()
            yield TokenStep(None, None, (), "cancelled", clock.read())
            return
        if forced or jump_forward:
            token_id = (forced or jump_forward).popleft()
            sampler.observe(token_id)
        else:
            token_id = sampler.sample(logits, None if constraint is None else constraint.allowed_mask())
        logprob, top_logprobs = report_logprobs(logits, token_id, config.logprobs)
        clock.token_done()
        if constraint is not None:
            constraint.commit(token_id)
        finish_reason = find_finish_reason(token_id, generated, room, config, limits.stop_token_ids)
        complete = constraint is not None and constraint.complete
        if complete and finish_reason != "stop":
            finish_reason = None
        if complete or finish_reason is not None:
            decoder.rollback()
        yield TokenStep(token_id, logprob, top_logprobs, finish_reason, clock.read(), of_prompt)
        of_prompt = ()
        if finish_reason is not None:
            return
        if complete:
            yield TokenStep(None, None, (), "stop", clock.read())
            return
        if constraint is not None and not (forced or jump_forward):
            jump_forward.extend(constraint.jump_forward_tokens())
        most = room - generated - 1
        together = list(islice(jump_forward, min(most, MOST_DRAFTED)))  # few at a time: each has logits of its own
        logits = None if limits.cancelled() else decoder.step(token_id, most, together)


def stream_text(steps: Iterator[TokenStep], text: TextStream) -> Generator[Chunk, None, None]:
    """Turn token steps into chunks, up to a stop text or the last step."""
    for step in steps:
        chunk = text.push(step)
        yield chunk
        if chunk.finish_reason is not None:
            return


def find_finish_reason(
    token_id: int, generated: int, room: int, config: GenerationConfig, stop_token_ids: Collection[int]
) -> FinishReason | None:
    """Whether this token, the `generated`th of at most `room`, is the last one, and why."""
    if token_id in stop_token_ids and not config.ignore_eos:
        return "stop"
    if generated == config.max_new_tokens:
        return "length"
    return "context" if generated == room else None


def report_logprobs(
    logits: Logits, token_id: int, wanted: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probability of the token, and the `wanted` most likely tokens with theirs, under the bare logits."""
    if wanted is None:
        return None, ()
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:wanted]
    return float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in best)


def score_prompt(
    sequence: CachedSequence, prompt_ids: Sequence[int], wanted: int, cancelled: Callable[[], bool]
) -> tuple[Logits | None, tuple[TokenLogprobs, ...]]:
    """Compute the whole prompt: logits after it, None if `cancelled`, and the log-probabilities of its tokens."""
    scored: list[TokenLogprobs] = [(None, ())]
    logits: Logits | None = None
    for piece in sequence.logits_of_last(prompt_ids, len(prompt_ids), from_scratch=True):
        if cancelled():
            return None, ()
        for logits in piece:
            if len(scored) < len(prompt_ids):
                scored.append(report_logprobs(logits, prompt_ids[len(scored)], wanted))
    return logits, tuple(scored)


class _Clock:
    """Measures one generation; seconds since it was made."""

    def __init__(self, prompt_tokens: int, decoder: Decoder) -> None:
        self._start = time.perf_counter()
        self._prompt_tokens, self.cached_tokens = prompt_tokens, 0
        self._prefill_s = self._first_s = self._last_s = 0.0
        self._new_tokens = 0
        self._decoder = decoder

    def prefilled(self) -> None:
        self._prefill_s = time.perf_counter() - self._start

    def token_done(self) -> None:
        self._last_s = time.perf_counter() - self._start
        self._new_tokens += 1
        if self._new_tokens == 1:
            self._first_s = self._last_s

    def read(self) -> Timings:
        return Timings(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self.cached_tokens,
            prefill_s=self._prefill_s,
            ttft_s=self._first_s,
            new_tokens=self._new_tokens,
            decode_s=self._last_s - self._first_s,
            drafted_tokens=self._decoder.drafted,
            accepted_tokens=self._decoder.accepted,
        )
