"""What is measured: the work of a profile, and the seconds that a model takes for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from normistral.errors import UsageError
from normistral.runtime.model import Model
from normistral.runtime.tuned import Profile

_STEPS = 16  # that are timed, for answers of any length: they cost the same, but for a cache that grows
_LEAST_PROMPT = 8


@dataclass(frozen=True, slots=True)
class Work:
    """One request: seconds = those of the prompt + answer · the median of a step's.

    Attributes:
        prompt, answer: tokens.
    """

    prompt: int
    answer: int


# A question with some history and a page of answer; a long text and a line about it; many of middling length.
WORK: dict[Profile, Work] = {
    "chat": Work(prompt=200, answer=200),
    "documents": Work(prompt=1024, answer=32),
    "batch": Work(prompt=512, answer=100),
}


def choose_work(profile: str, context_length: int) -> Work:
    """A profile's work, with a shorter prompt where the context has no room for it.

    Raises:
        UsageError: no such profile, or a context that is too short for any.
    """
    work = next((work for name, work in WORK.items() if name == profile), None)
    if work is None:
        raise UsageError(f"there is no profile {profile!r}", f"take one of: {', '.join(WORK)}")
    prompt = min(work.prompt, context_length - _STEPS)
    if prompt < _LEAST_PROMPT:
        raise UsageError(f"a context of {context_length} tokens is too short for anything to be measured")
    return replace(work, prompt=prompt)


def measure(model: Model, work: Work, token_ids: Sequence[int]) -> float:
    """Seconds that this work takes, the model being loaded.

    Args:
        token_ids: at least one; the prompt repeats them.
    """
    prompt = [token_ids[i % len(token_ids)] for i in range(work.prompt)]
    sequence = model.create_sequence()
    try:
        # The first piece of its length compiles kernels, and a server pays for that once.
        sequence.prefill(prompt[: model.capabilities.prefill_chunk], _never)
        sequence.prefill([prompt[-1]], _never)
        started = time.perf_counter()
        sequence.prefill(prompt, _never)
        prompt_s = time.perf_counter() - started
        steps = []
        for i in range(_STEPS):
            started = time.perf_counter()
            sequence.append([prompt[i % len(prompt)]])
            steps.append(time.perf_counter() - started)
    finally:
        sequence.close()
    return prompt_s + work.answer * statistics.median(steps)


def _never() -> bool:
    return False
