"""Speed of a loaded model, through its public interface: what is measured, and one measurement of each kind.

Prompts are random token ids, the same ones every time. What a prompt says does not change how long its products
take; it would change how often a drafted token is accepted, so nothing is drafted here. Every prompt begins
differently from the one before, or the KV cache would know its beginning.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ContextLengthError, UsageError
from normistral.evaluation.bench.machine import EnergyCounter, is_steady
from normistral.runtime.model import Model

# Greedy, and never at an end of its own: every run does the same work.
_PLAIN: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "draft": "off"}
_TRIES = 3  # of a decode while memory changes its speed
_MIN_CONTEXT = 16  # a question, an answer and another question of some tokens each
_FINGERPRINT_PROMPT = "Det var en gang en konge som hadde tre sønner, og den yngste"
_FINGERPRINT_TOKENS = 32
_PROSE = (
    "I går kveld tok vi den siste båten ut til øya. Det blåste opp fra nordvest, og bølgene slo mot den gamle brygga, "
    "men kaféen ved havna var fremdeles åpen. Der satt det noen fiskere og snakket om været, om prisen på torsk og om "
    "ungene som hadde flyttet til byen for å studere. Ingen av dem trodde at de ville komme tilbake før jul."
)


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """Lengths in tokens, and numbers of measurements; the defaults are those of `normistral bench`.

    Attributes:
        prefill_lengths: prompts that are read from the first token on.
        decode_contexts: tokens before the first one that is decoded.
        decode_tokens: decoded at each of them.
        question_tokens, answer_tokens, follow_up_tokens: of a conversation of two turns.
        repeats: measurements of each kind.
        warm_ups: further ones before, which do not count.
    """

    prefill_lengths: tuple[int, ...] = (128, 512, 2048)
    decode_contexts: tuple[int, ...] = (16, 512, 2048)
    decode_tokens: int = 32
    question_tokens: int = 200
    answer_tokens: int = 32
    follow_up_tokens: int = 50
    repeats: int = 5
    warm_ups: int = 1

    def __post_init__(self) -> None:
        for name in ("prefill_lengths", "decode_contexts"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1 or sorted(set(lengths)) != list(lengths):
                raise UsageError(f"{name} {lengths}: not rising whole numbers from 1", "such as: 128,512,2048")
        for name in ("decode_tokens", "question_tokens", "answer_tokens", "follow_up_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} has to be 1 or more, not {getattr(self, name)}", "leave it out")

    @property
    def points(self) -> tuple[tuple[int, int], ...]:
        """(tokens of the prompt, tokens to decode after it), shortest first: one call measures both of a length."""
        lengths = sorted({*self.prefill_lengths, *self.decode_contexts})
        return tuple((length, self.decode_tokens if length in self.decode_contexts else 0) for length in lengths)

    @property
    def most_tokens(self) -> int:
        """The longest sequence of all."""
        return max(
            *(length + decoded + 1 for length, decoded in self.points),
            self.question_tokens + self.answer_tokens + self.follow_up_tokens + 1,
        )


QUICK = SpeedPlan(prefill_lengths=(128, 512), decode_contexts=(16, 512), decode_tokens=16, repeats=3)


def cut_to_context(plan: SpeedPlan, context_length: int) -> SpeedPlan:
    """The plan without what the context has no room for; a context shorter than all of it is filled.

    Raises:
        ContextLengthError: nothing can be measured in so short a context.
    """
    if context_length < _MIN_CONTEXT:
        raise ContextLengthError(f"a context of {context_length} tokens is too short to measure speed in")
    decode_tokens = min(plan.decode_tokens, context_length // 2)
    longest_prompt, longest_context = context_length - 1, context_length - 1 - decode_tokens
    turns = plan.question_tokens + plan.answer_tokens + plan.follow_up_tokens
    part = min(1.0, (context_length - 1) / turns)
    return replace(
        plan,
        prefill_lengths=_cut(plan.prefill_lengths, longest_prompt),
        decode_contexts=_cut(plan.decode_contexts, longest_context),
        decode_tokens=decode_tokens,
        question_tokens=max(1, int(plan.question_tokens * part)),
        answer_tokens=max(1, int(plan.answer_tokens * part)),
        follow_up_tokens=max(1, int(plan.follow_up_tokens * part)),
    )


def _cut(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    return tuple(length for length in lengths if length <= longest) or (longest,)


@dataclass(frozen=True, slots=True)
class Pass:
    """A prompt read, and tokens decoded after it.

    Attributes:
        prefill_tokens: of the prompt, those that were computed.
        decode_tokens: after the first one, whose logits the prompt gave.
        prefill_joules, decode_joules: None where the machine does not count them.
        bandwidth_gb_per_s: of the memory just before and just after decoding; None where it was not measured.
        dropped: decodes before this one during which it changed.
    """

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    prefill_joules: float | None = None
    decode_joules: float | None = None
    bandwidth_gb_per_s: tuple[float, float] | None = None
    dropped: int = 0

    @property
    def steady(self) -> bool:
        """False if the bandwidth is known to have changed while decoding."""
        return self.bandwidth_gb_per_s is None or is_steady(*self.bandwidth_gb_per_s)


@dataclass(frozen=True, slots=True)
class ConversationPass:
    """Seconds to the first token of both turns; `cached_tokens` of the second prompt were not computed again."""

    first_ttft_s: float
    second_ttft_s: float
    cached_tokens: int


def random_ids(tokenizer: Tokenizer, count: int, seed: int) -> list[int]:
    """Token ids of the vocabulary, always the same for a seed."""
    return random.Random(seed).choices(range(tokenizer.vocabulary_size), k=count)


def measure_pass(
    model: Model,
    length: int,
    decode_tokens: int,
    seed: int,
    counter: EnergyCounter | None = None,
    gb_per_s: Callable[[], float] | None = None,
) -> Pass:
    """Read a prompt of `length` tokens that the cache does not know, then decode.

    Args:
        gb_per_s: measures the bandwidth of the memory, just before and just after decoding. Where the two differ, the
            same tokens are decoded again, at most twice.
    """
    prompt = random_ids(model.tokenizer, length, seed)
    measured = _measure_once(model, prompt, decode_tokens, counter, gb_per_s)
    for dropped in range(1, _TRIES):
        if measured.steady:
            break
        again = _measure_once(model, prompt, decode_tokens, counter, gb_per_s)  # the cache holds the prompt now
        measured = replace(
            again,
            prefill_tokens=measured.prefill_tokens,
            prefill_s=measured.prefill_s,
            prefill_joules=measured.prefill_joules,
            dropped=dropped,
        )
    return measured


def _measure_once(
    model: Model,
    prompt: list[int],
    decode_tokens: int,
    counter: EnergyCounter | None,
    gb_per_s: Callable[[], float] | None,
) -> Pass:
    marks = [counter.read()] if counter else []
    timings, still_s, bandwidths = None, 0.0, []
    for chunk in model.stream(prompt, max_new_tokens=decode_tokens + 1, **_PLAIN):
        if timings is None:
            marks += [counter.read()] if counter else []
            if gb_per_s is not None:  # the next token is computed when it is asked for
                started = time.perf_counter()
                bandwidths.append(gb_per_s())
                still_s = time.perf_counter() - started
            marks += [counter.read()] if counter else []
        timings = chunk.timings
    assert timings is not None
    prefill_joules = decode_joules = None
    if counter:
        marks.append(counter.read())
        prefill_joules, decode_joules = counter.joules_between(*marks[:2]), counter.joules_between(*marks[2:])
    return Pass(
        prefill_tokens=timings.prompt_tokens - timings.cached_tokens,
        prefill_s=timings.prefill_s,
        decode_tokens=timings.new_tokens - 1,
        decode_s=timings.decode_s - still_s,
        prefill_joules=prefill_joules,
        decode_joules=decode_joules,
        bandwidth_gb_per_s=(bandwidths[0], gb_per_s()) if gb_per_s is not None else None,
    )


def measure_first_token(model: Model, question_tokens: int, seed: int) -> float:
    """Seconds to the first token after a question that the cache does not know."""
    question = random_ids(model.tokenizer, question_tokens, seed)
    return model.generate(question, max_new_tokens=1, **_PLAIN).timings.ttft_s


def measure_conversation(model: Model, plan: SpeedPlan, seed: int) -> ConversationPass:
    """A question, its answer, and a second question, which finds the first two in the cache."""
    prompt = random_ids(model.tokenizer, plan.question_tokens + plan.follow_up_tokens, seed)
    question, follow_up = prompt[: plan.question_tokens], prompt[plan.question_tokens :]
    first = model.generate(question, max_new_tokens=plan.answer_tokens, **_PLAIN)
    second = model.generate([*question, *first.token_ids, *follow_up], max_new_tokens=1, **_PLAIN)
    return ConversationPass(first.timings.ttft_s, second.timings.ttft_s, second.timings.cached_tokens)


def fingerprint(model: Model) -> str:
    """SHA-256 of the ids that it writes after a fixed text, as decimal numbers with commas: equal means same output."""
    prompt = model.tokenizer.encode(_FINGERPRINT_PROMPT)[: max(1, model.context_length // 2)]
    written = model.generate(prompt, max_new_tokens=_FINGERPRINT_TOKENS, **_PLAIN).token_ids
    return hashlib.sha256(",".join(map(str, written)).encode("ascii")).hexdigest()


def tokens_per_word(tokenizer: Tokenizer) -> float:
    """Tokens per word of Norwegian prose, on a short text."""
    return len(tokenizer.encode(_PROSE, add_special_tokens=False)) / len(_PROSE.split())
