"""Round-robin scheduling of jobs on one model, a token at a time; prefixes are shared within a tenant.

The engines below compute one sequence at a time, so concurrency brings fairness and no throughput: turns go round the
tenants, and round the jobs of each, so that a tenant with many jobs gets no more than one with a single job. A prompt
is computed in the engine's own chunks, each a turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from normistral.errors import EngineError, NormistralError
from normistral.runtime.chunks import Chunk
from normistral.runtime.model import Model
from normistral.runtime.sequence import WORTH_COPYING, CachedSequence
from normistral.server.backends.base import BatchSettings, Job, JobUpdate, cache_token_bytes, never
from normistral.server.backends.prefixes import LoadedPrefix


@dataclass(slots=True)
class _Kept:
    """A sequence and whose text its cache holds."""

    tenant: str
    sequence: CachedSequence


@dataclass(slots=True)
class _Running:
    """A job that has a sequence."""

    job: Job
    sequence: CachedSequence
    cost: int  # tokens that its cache may come to hold
    cached: int  # tokens of its prompt that were there already
    started: float = field(default_factory=time.perf_counter)
    prefilled: int = 0
    generating_since: float = 0.0
    chunks: Iterator[Chunk] | None = None


class RoundRobinScheduler:
    """A `BatchBackend` for any model of the library.

    Args:
        model: closed with the batch.
        settings: `cache_bytes` bounds the caches of jobs under way together with those that are kept.
        prefixes: that jobs of all tenants may copy from.
    """

    def __init__(self, model: Model, settings: BatchSettings, prefixes: Sequence[LoadedPrefix] = ()) -> None:
        self._model, self._prefixes = model, prefixes
        self.room = max(settings.cache_bytes // cache_token_bytes(model.manifest), model.context_length)  # tokens
        self._waiting: deque[Job] = deque()
        self._running: dict[str, _Running] = {}
        self._turns: dict[str, deque[str]] = {}  # tenant -> its jobs, both in the order in which they come next
        self._kept: list[_Kept] = []  # the one used longest ago first

    @property
    def idle(self) -> bool:
        """No job is under way."""
        return not self._waiting and not self._running

    def add(self, job: Job) -> None:
        """Take up a job, as soon as there is room for its cache."""
        self._waiting.append(job)

    def cancel(self, job_id: str) -> None:
        """Give up a job; what its cache holds is kept."""
        self._waiting = deque(job for job in self._waiting if job.job_id != job_id)
        if job_id in self._running:
            self._retire(job_id)

    def step(self) -> list[JobUpdate]:
        """One turn: a slice of a prompt (then nothing is to be told), or a token."""
        failed = self._start_waiting()
        if failed or not self._running:
            return failed
        running = self._next_turn()
        try:
            chunk = self._advance(running)
        except NormistralError as error:
            self._drop(running.job.job_id).sequence.close()
            return [JobUpdate(running.job.job_id, error)]
        if chunk is None:
            return []
        if chunk.finish_reason is not None:
            self._retire(running.job.job_id)
        return [JobUpdate(running.job.job_id, chunk)]

    def close(self) -> None:
        """Free engine and caches."""
        self._waiting.clear()
        self._running.clear()
        self._turns.clear()
        self._kept.clear()
        self._model.close()

    def _start_waiting(self) -> list[JobUpdate]:
        """Give sequences to waiting jobs in their order, as far as there is room."""
        while self._waiting:
            job = self._waiting[0]
            cost = min(len(job.prompt_ids) + job.config.max_new_tokens, self._model.context_length)
            if not self._make_room(cost, job):
                break
            self._waiting.popleft()
            try:
                sequence = self._take_sequence(job)
                # A prompt whose log-probabilities are asked for is computed whole, where they are.
                scored = job.config.prompt_logprobs is not None
                cached = 0 if scored else sequence.reuse(job.prompt_ids, reproducible=job.config.reproducible)
            except NormistralError as error:
                return [JobUpdate(job.job_id, error)]
            self._running[job.job_id] = _Running(
                job, sequence, cost, cached, prefilled=len(job.prompt_ids) if scored else cached
            )
            self._turns.setdefault(job.tenant, deque()).append(job.job_id)
        return []

    def _make_room(self, cost: int, job: Job) -> bool:
        """Free kept caches, the one used longest ago first, until the job's fits; one job alone always does."""
        taken = sum(running.cost for running in self._running.values())
        continued = self._find_continued(job)
        while taken + cost + sum(kept.sequence.length for kept in self._kept if kept is not continued) > self.room:
            victim = next((kept for kept in self._kept if kept is not continued), None)
            if victim is None:
                return not self._running
            self._kept.remove(victim)
            victim.sequence.close()
        return True

    def _take_sequence(self, job: Job) -> CachedSequence:
        """The kept one that the job goes on from, or a new one that may copy from its tenant's."""
        continued = self._find_continued(job)
        if continued is not None:
            self._kept.remove(continued)
            return continued.sequence
        return self._model.create_sequence(lambda: self._neighbours(job))

    def _find_continued(self, job: Job) -> _Kept | None:
        """The tenant's kept sequence of which the job needs most, if little else is in it."""
        common = [
            (kept.sequence.common_prefix(job.prompt_ids), kept) for kept in self._kept if kept.tenant == job.tenant
        ]
        shared, best = max(common, key=lambda pair: pair[0], default=(0, None))
        return best if best is not None and shared and best.sequence.length - shared < WORTH_COPYING else None

    def _neighbours(self, job: Job) -> list[CachedSequence]:
        """Sequences that a job may copy from: its tenant's, and prefixes that it begins with."""
        running = [other.sequence for other in self._running.values() if other.job.tenant == job.tenant]
        kept = [kept.sequence for kept in self._kept if kept.tenant == job.tenant]
        return running + kept + [one.sequence for one in self._prefixes if one.begins(job.prompt_ids[:-1])]

    def _next_turn(self) -> _Running:
        """The job whose turn it is; its tenant and then itself go to the end."""
        tenant, job_ids = next(iter(self._turns.items()))
        self._turns[tenant] = self._turns.pop(tenant)
        job_ids.rotate(-1)
        return self._running[job_ids[-1]]

    def _advance(self, running: _Running) -> Chunk | None:
        """Compute a slice of the prompt, or the next chunk."""
        prompt_ids, slice_tokens = running.job.prompt_ids, self._model.capabilities.prefill_chunk
        if running.chunks is None:
            if len(prompt_ids) - running.prefilled > slice_tokens:
                running.prefilled += slice_tokens
                running.sequence.prefill(
                    prompt_ids[: running.prefilled], never, reproducible=running.job.config.reproducible
                )
                return None
            running.generating_since = time.perf_counter()
            running.chunks = self._model.run(running.sequence, prompt_ids, running.job.config, never)
        chunk = next(running.chunks, None)
        if chunk is None:
            raise EngineError("the generation ended without a reason", "report this")
        earlier = running.generating_since - running.started
        timings = replace(
            chunk.timings,
            cached_tokens=running.cached,
            prefill_s=chunk.timings.prefill_s + earlier,
            ttft_s=chunk.timings.ttft_s + earlier,
        )
        return replace(chunk, timings=timings)

    def _retire(self, job_id: str) -> None:
        """Take a job out and keep its cache."""
        running = self._drop(job_id)
        if running.sequence.length:
            self._kept.append(_Kept(running.job.tenant, running.sequence))
        else:
            running.sequence.close()

    def _drop(self, job_id: str) -> _Running:
        running = self._running.pop(job_id)
        jobs = self._turns[running.job.tenant]
        jobs.remove(job_id)
        if not jobs:
            del self._turns[running.job.tenant]
        return running
