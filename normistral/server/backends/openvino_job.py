"""One answer under way: its tokens so far, and the chunks that they become. It does not know openvino_genai."""

from __future__ import annotations

import time
from collections.abc import Collection

from normistral.runtime.chunks import Chunk, Timings
from normistral.runtime.generate import find_finish_reason
from normistral.runtime.text_stream import TextStream, TokenStep
from normistral.server.backends.base import Job


class Answer:
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
