"""The answers to one request: its jobs, and what comes of them, as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from normistral.errors import NormistralError
from normistral.runtime.chunks import Chunk, Timings
from normistral.server.admission import Admission
from normistral.server.backends.base import Job
from normistral.server.errors import ApiError, unavailable
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.worker_client import Outcome


class Arrival(NamedTuple):
    """The next chunk of one of the answers."""

    choice: int
    chunk: Chunk


class Generation:
    """Jobs of one request. Whoever begins it closes it.

    Args:
        model: name, for the metrics.
        began: `time.monotonic()` when the request came.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        admission: Admission,
        limits: ServerLimits,
        metrics: Metrics,
        model: str,
        began: float,
    ) -> None:
        self._jobs, self._admission, self._limits = jobs, admission, limits
        self._metrics, self._model, self._began = metrics, model, began
        self._index = {job.job_id: index for index, job in enumerate(jobs)}
        self._open: set[str] = set()  # handed in and not ended
        self._started: set[str] = set()
        self._arrived: asyncio.Queue[tuple[int, Outcome]] = asyncio.Queue()

    def begin(self) -> None:
        """Hand in the jobs; raises ApiError as `Admission.submit`."""
        self._admission.submit(self._jobs, self._deliver)
        self._open = set(self._index)

    def close(self) -> None:
        """Give up what is not finished."""
        for job_id in list(self._open):
            self._open.discard(job_id)
            self._admission.cancel(job_id)
            self._metrics.cancelled.labels(self._model).inc()

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Every chunk of every answer, until all have ended.

        Raises:
            ApiError, NormistralError: what ended one of them.
        """
        ended = 0
        deadline = self._began + self._limits.request_s
        while ended < len(self._jobs):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    index, outcome = await self._arrived.get()
            except TimeoutError:
                raise unavailable(
                    f"the answer took more than {self._limits.request_s:g} s", "ask for less", code="request_timeout"
                ) from None
            if isinstance(outcome, NormistralError):
                raise outcome
            if outcome.finish_reason == "cancelled":
                raise unavailable("the answer was given up", "ask again")
            ended += outcome.finish_reason is not None
            yield Arrival(index, outcome)

    def _deliver(self, job_id: str, outcome: Outcome) -> None:
        if isinstance(outcome, Chunk):
            if outcome.token_id is not None:
                self._metrics.generated_tokens.labels(self._model).inc()
                if job_id not in self._started:
                    self._started.add(job_id)
                    self._metrics.first_token.labels(self._model).observe(time.monotonic() - self._began)
            if outcome.finish_reason is not None:
                self._open.discard(job_id)
                self._count(outcome.timings)
        else:
            self._open.discard(job_id)
        if self._arrived.qsize() >= self._limits.backlog:
            self.close()
            outcome = ApiError(408, "the answer was not read in time", code="reader_too_slow")
        self._arrived.put_nowait((self._index[job_id], outcome))

    def _count(self, timings: Timings) -> None:
        self._metrics.prompt_tokens.labels(self._model).inc(timings.prompt_tokens)
        self._metrics.cached_tokens.labels(self._model).inc(timings.cached_tokens)
        if timings.new_tokens > 1:
            self._metrics.speed.labels(self._model).observe(timings.tokens_per_s)
