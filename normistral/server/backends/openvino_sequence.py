"""One running sequence: its tokens so far, and the chunks made of them. It does not know openvino_genai."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from normistral.runtime.chunks import Chunk, Timings
from normistral.runtime.generate import find_finish_reason
from normistral.runtime.options import GenerationConfig, default_of
from normistral.runtime.text_stream import TextStream, TokenStep
from normistral.server.backends.base import Job

_SEED_BITS = 32  # mt19937 takes no more
# Logits are float32 of magnitude 10 to 30, with steps of about 2e-6: below this, the most likely token is all there is,
# and openvino_genai, which divides in float32, would come to infinity.
_GREEDY_BELOW = 1e-6
_SINGLE_TOKEN_P = 1e-6  # below it, top_p is reached by the first token of any vocabulary
_LIBRARY_ONLY = (
    "prompt_logprobs",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "xtc_probability",
    "logit_bias",
)


class RunningSequence:
    """One job's answer.

    Attributes:
        job: what was asked for.
        room: most tokens that it may have.
        part: how many times its generation was begun anew, because tokens were put in.

    Args:
        text: for what follows the job's prompt.
        stop_token_ids: the model's own ends of sequence.
        context_length: the most tokens that prompt and answer may take together.
    """

    def __init__(self, job: Job, text: TextStream, stop_token_ids: Collection[int], context_length: int) -> None:
        self.job = job
        self.room = min(job.config.max_new_tokens, context_length - len(job.prompt_ids))
        self.part = 0
        self._text = text
        self._stop_token_ids = stop_token_ids
        self._token_ids: list[int] = []
        self._asked = time.perf_counter()
        self._began = self._first = self._last = self._asked

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.job.prompt_ids, *self._token_ids]

    @property
    def tokens(self) -> int:
        """Most tokens that prompt and answer come to."""
        return len(self.job.prompt_ids) + self.room

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.room - len(self._token_ids)

    @property
    def must_force(self) -> bool:
        """Whether tokens come next that are not asked of the model."""
        return bool(self._text.forced)

    def begin(self) -> None:
        """Its prompt is being computed from now on."""
        if not self._token_ids:
            self._began = time.perf_counter()

    def force(self) -> Chunk:
        """Take the next of the tokens that are not asked of the model."""
        return self.push(self._text.forced.popleft(), None)

    def push(self, token_id: int, logprob: float | None) -> Chunk:
        """Take one more token; the last chunk has a finish reason."""
        self._last = time.perf_counter()
        if not self._token_ids:
            self._first = self._last
        self._token_ids.append(token_id)
        config = self.job.config
        finish_reason = find_finish_reason(token_id, len(self._token_ids), self.room, config, self._stop_token_ids)
        shown = None if config.logprobs is None else logprob
        return self._text.push(TokenStep(token_id, shown, (), finish_reason, self._timings()))

    def _timings(self) -> Timings:
        return Timings(
            prompt_tokens=len(self.job.prompt_ids),
            cached_tokens=0,  # openvino_genai does not tell
            prefill_s=self._first - self._began,
            ttft_s=self._first - self._asked,
            new_tokens=len(self._token_ids),
            decode_s=self._last - self._first,
        )


def find_unsupported(config: GenerationConfig) -> str | None:
    """What of these options openvino_genai cannot do as the library does it; None if it honours all."""
    if config.structure is not None:
        return "structured output: openvino_genai has another grammar library, which takes and writes other forms"
    if changed := [name for name in _LIBRARY_ONLY if getattr(config, name) != default_of(name)]:
        return f"{changed[0]}: a sampler of the library"
    if config.logprobs is not None and config.logprobs > 0:
        return f"logprobs={config.logprobs}: openvino_genai tells the log-probability of the chosen token alone"
    if config.logprobs is not None and config.max_reasoning_tokens is not None:
        return "logprobs with max_reasoning_tokens: openvino_genai tells none for a closing tag that is put in"
    return None


def genai_config(config: GenerationConfig, room: int, stop_token_ids: Collection[int], part: int) -> Any:
    """An `openvino_genai.GenerationConfig`.

    Args:
        room: most tokens to generate.
        stop_token_ids: the model's own ends; stop texts are found in our text.
        part: 0 for a whole answer; an answer that is put together from several draws other numbers in each.
    """
    import openvino_genai

    wanted = openvino_genai.GenerationConfig()
    wanted.apply_chat_template = False
    wanted.max_new_tokens = room
    wanted.ignore_eos = config.ignore_eos or not stop_token_ids
    wanted.stop_token_ids = set(stop_token_ids)
    if stop_token_ids:  # without one, the pipeline puts in its own
        wanted.set_eos_token_id(min(stop_token_ids))
    wanted.repetition_penalty = config.repetition_penalty
    wanted.logprobs = 1  # 0 would leave nothing to tell logits that are not finite by
    # Both are rounded to float32 there, where 5e-324 is 0 and 1 - 1e-9 is 1; either leaves the most likely token alone.
    top_p, min_p = np.float32(config.top_p), np.float32(config.min_p)
    wanted.do_sample = config.temperature >= _GREEDY_BELOW and top_p >= _SINGLE_TOKEN_P and min_p < 1.0
    if wanted.do_sample:
        wanted.temperature = config.temperature
        wanted.top_p = float(top_p)
        wanted.min_p = float(min_p)
        if config.top_k:  # its own default is all, and 0 is none
            wanted.top_k = config.top_k
        wanted.rng_seed = _seed(config.seed, part)
    return wanted


def _seed(seed: int | None, part: int) -> int:
    if seed is None:
        return secrets.randbits(_SEED_BITS)
    return (seed ^ seed >> _SEED_BITS) + part & (1 << _SEED_BITS) - 1
