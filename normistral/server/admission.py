"""Admission of jobs and the order in which they reach the worker.

Jobs wait here, not in the worker, which gets as many as it has slots for: so order, limits and waiting times are the
same on every engine. Slots go round the tenants. Where there are several, none holds more than three quarters of them,
so that the next one need not wait for an answer of a busy one to end.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from normistral.errors import NormistralError
from normistral.server.backends.base import Job
from normistral.server.errors import ApiError, unavailable
from normistral.server.limits import ServerLimits
from normistral.server.worker_client import JobOutput, WorkerClient

_TENANT_SHARE = 0.75
_AVERAGE_WEIGHT = 0.2  # of the latest job, in the mean time that a job holds a slot


@dataclass(slots=True)
class _Entry:
    job: Job
    deliver: Callable[[str, JobOutput], None]
    expiry: asyncio.TimerHandle
    began: float = 0.0


class Admission:
    """The jobs of one worker. Call `pump` when the worker has become ready.

    Args:
        require_reachable: raises ApiError where waiting for the worker is of no use.
        on_change: called when jobs have come or ended.
        several: there may be several tenants.

    Attributes:
        held: the worker gets no further jobs.
    """

    def __init__(
        self,
        worker: WorkerClient,
        limits: ServerLimits,
        require_reachable: Callable[[], None],
        on_change: Callable[[], None],
        *,
        several: bool,
    ) -> None:
        self.held = False
        self._worker, self._limits = worker, limits
        self._reachable, self._on_change = require_reachable, on_change
        self._share = _TENANT_SHARE if several else 1.0
        self._waiting: dict[str, deque[_Entry]] = {}  # by tenant, in the order in which they come next
        self._running: dict[str, _Entry] = {}
        self._preparing: Counter[str] = Counter()  # answers whose prompts are being made into tokens, by tenant
        self._mean_s = 1.0
        self._refusal: ApiError | None = None

    @property
    def waiting(self) -> int:
        """Number of queued jobs."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Number of jobs in the worker."""
        return len(self._running)

    @property
    def preparing_answers(self) -> int:
        """Number of answers whose prompts are being made into tokens."""
        return self._preparing.total()

    def hold(self, held: bool) -> None:
        """Give the worker no further jobs, or again."""
        if held != self.held:
            self.held = held
            self.pump()

    def require_reachable(self) -> None:
        """Raise ApiError if no more requests are taken: the server stops, or there will be no worker soon."""
        if self._refusal is not None:
            raise self._refusal
        self._reachable()

    @contextmanager
    def preparing(self, tenant: str, answers: int) -> Iterator[None]:
        """Count a request's answers before they are jobs.

        Raises:
            ApiError: as `submit`.
        """
        self._require_room(tenant, answers)
        self._preparing[tenant] += answers
        try:
            yield
        finally:
            self._preparing[tenant] -= answers
            self._preparing += Counter()  # without those that have none
            self._on_change()

    def submit(self, jobs: Sequence[Job], deliver: Callable[[str, JobOutput], None]) -> None:
        """Take up the jobs of one request, or none of them.

        Args:
            deliver: called with a job's id and what `WorkerClient.add` delivers.

        Raises:
            ApiError: 503 while the model cannot be had or the server stops, 429 when too many wait.
        """
        tenant = jobs[0].tenant
        self._require_room(tenant, len(jobs))
        loop = asyncio.get_running_loop()
        for job in jobs:
            entry = _Entry(job, deliver, loop.call_later(self._limits.queue_s, self._expire, job.job_id))
            self._waiting.setdefault(tenant, deque()).append(entry)
        self.pump()
        self._on_change()

    def cancel(self, job_id: str) -> None:
        """Give up a job; nothing more is delivered."""
        if self._running.pop(job_id, None) is not None:
            self._worker.cancel(job_id)
        else:
            self._take_waiting(job_id)
        self.pump()
        self._on_change()

    def pump(self) -> None:
        """Hand jobs to the worker while it has free slots."""
        loaded = self._worker.loaded
        while loaded is not None and not self.held and len(self._running) < loaded.slots:
            entry = self._next(most=max(1, int(self._share * loaded.slots)))
            if entry is None:
                return
            entry.expiry.cancel()
            entry.began = time.monotonic()
            job_id = entry.job.job_id
            self._running[job_id] = entry
            self._worker.add(entry.job, lambda output, job_id=job_id: self._arrived(job_id, output))  # type: ignore[misc]

    def refuse(self, error: ApiError) -> None:
        """Refuse all further requests with this error."""
        self._refusal = error

    def fail_waiting(self, error: ApiError) -> None:
        """Fail all queued jobs with this error."""
        self._fail([entry for entries in self._waiting.values() for entry in entries], error)

    def abort(self, error: ApiError) -> None:
        """Fail all queued and running jobs with this error."""
        self._fail(list(self._running.values()), error)
        self.fail_waiting(error)

    def explain_wait(self) -> ApiError:
        """503: a job has waited too long."""
        if self._worker.loaded is None:
            waited = f"{self._worker.name} was not loaded within {self._limits.queue_s:g} s"
            hint = "ask again later; a model is loaded when there is memory for it and others have had their turn"
            return unavailable(waited, hint, code="queue_timeout", retry_after_s=self._wait_s())
        waited = f"the answer did not begin within {self._limits.queue_s:g} s"
        return unavailable(waited, "ask again later", code="queue_timeout", retry_after_s=self._wait_s())

    def _fail(self, entries: Sequence[_Entry], error: ApiError) -> None:
        for entry in entries:
            self.cancel(entry.job.job_id)
            entry.deliver(entry.job.job_id, error)

    def _require_room(self, tenant: str, answers: int) -> None:
        self.require_reachable()
        of_tenant = len(self._waiting.get(tenant, ())) + sum(e.job.tenant == tenant for e in self._running.values())
        if self.waiting + self.running + self._preparing.total() + answers > self._limits.jobs:
            raise self._too_many("the server has", self._limits.jobs, "queue_full")
        if of_tenant + self._preparing[tenant] + answers > self._limits.tenant_jobs:
            raise self._too_many("this key has", self._limits.tenant_jobs, "tenant_queue_full")

    def _next(self, most: int) -> _Entry | None:
        """Oldest queued job of the next tenant in round-robin order."""
        holds = Counter(entry.job.tenant for entry in self._running.values())
        tenant = next((tenant for tenant in self._waiting if holds[tenant] < most), None)
        if tenant is None:
            return None
        entries = self._waiting.pop(tenant)
        entry = entries.popleft()
        if entries:
            self._waiting[tenant] = entries
        return entry

    def _arrived(self, job_id: str, output: JobOutput) -> None:
        entry = self._running.get(job_id)
        if entry is None:
            return
        if isinstance(output, NormistralError) or output.finish_reason is not None:
            del self._running[job_id]
            self._mean_s += _AVERAGE_WEIGHT * (time.monotonic() - entry.began - self._mean_s)
            self.pump()
            self._on_change()
        entry.deliver(job_id, output)

    def _expire(self, job_id: str) -> None:
        entry = self._take_waiting(job_id)
        if entry is not None:
            entry.deliver(job_id, self.explain_wait())
            self._on_change()

    def _take_waiting(self, job_id: str) -> _Entry | None:
        for tenant, entries in self._waiting.items():
            for entry in entries:
                if entry.job.job_id == job_id:
                    entry.expiry.cancel()
                    entries.remove(entry)
                    if not entries:
                        del self._waiting[tenant]
                    return entry
        return None

    def _too_many(self, whose: str, most: int, code: str) -> ApiError:
        message = f"{whose} {most} answers under way, and takes no more"
        return ApiError(429, message, "ask again later", code=code, retry_after_s=self._wait_s())

    def _wait_s(self) -> float:
        """Estimated seconds until a slot is free for one more job."""
        slots = 1 if self._worker.loaded is None else self._worker.loaded.slots
        return min(60.0, self._mean_s * (1 + self.waiting / slots))


class RoundRobinSemaphore:
    """Semaphore that grants its places to tenants in round-robin order.

    Args:
        places: that may be taken at once.
        tenant_places: of these, by one tenant; None is all of them.
    """

    def __init__(self, places: int, tenant_places: int | None = None) -> None:
        self._free = places
        self._tenant_places = tenant_places or places
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant
        self._latest: dict[str, int] = {}  # number of the place that a tenant was given last
        self._given = 0

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Hold a place while the context is open; it is released one iteration of the event loop later."""
        await self.acquire(tenant)
        try:
            yield
        finally:
            asyncio.get_running_loop().call_soon(self.release, tenant)

    async def acquire(self, tenant: str) -> None:
        """Wait for a place; `release` has to follow."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(granted)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(tenant)
            else:
                self._leave(tenant, granted)
            raise

    def release(self, tenant: str) -> None:
        """Return a place and grant it to the next waiter."""
        self._free += 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._grant()

    def _grant(self) -> None:
        """Grant free places to the tenants that were served least recently."""
        while self._free:
            entitled = [tenant for tenant in self._waiting if self._taken[tenant] < self._tenant_places]
            if not entitled:
                return
            tenant = min(entitled, key=lambda one: self._latest.get(one, 0))
            granted = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not granted.cancelled():
                self._free -= 1
                self._given += 1
                self._taken[tenant] += 1
                self._latest[tenant] = self._given
                granted.set_result(None)

    def _leave(self, tenant: str, granted: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(tenant, deque())
        if granted in waiting:
            waiting.remove(granted)
        if not waiting:
            self._waiting.pop(tenant, None)
