"""Models of one server, and the jobs made of its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request

from normistral.errors import NormistralError
from normistral.runtime.options import GenerationConfig
from normistral.server.admission import RoundRobinSemaphore
from normistral.server.backends.base import Job
from normistral.server.errors import ApiError, unavailable
from normistral.server.generation import Generation, unless_gone
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.model_handler import ModelHandler
from normistral.server.residency import Residency, ResidencyOptions, ServedModel
from normistral.server.worker_client import WORKER_MODULE

T = TypeVar("T")

_PREPARING_THREADS = 2  # templates and tokenizers are quick; more at once would only take turns


class Service:
    """Everything behind the routes.

    Args:
        several: there may be several tenants.

    Attributes:
        residency: which models are in memory.
        models: by the name that requests use.
        stopping: no new answers are begun.
    """

    def __init__(
        self,
        handler: Sequence[ModelHandler],
        limits: ServerLimits,
        metrics: Metrics,
        worker_module: str = WORKER_MODULE,
        *,
        several: bool = True,
        residency: ResidencyOptions | None = None,
    ) -> None:
        self.limits, self.metrics = limits, metrics
        options = residency or ResidencyOptions()
        self.residency = Residency(handler, options, limits, metrics, worker_module, several=several)
        self.models = self.residency.models
        self.stopping = False
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
        self._turns = RoundRobinSemaphore(_PREPARING_THREADS, _PREPARING_THREADS - several)

    @property
    def ready(self) -> bool:
        """All models can answer, but for those that could not be loaded; those on demand are then loaded."""
        usable = [model for model in self.models.values() if model.failure is None]
        begun = self.residency.started and not self.stopping
        return begun and bool(usable) and all(model.available for model in usable)

    @property
    def failure(self) -> NormistralError | None:
        """Why no model could ever be loaded; None while one may be."""
        failures = [None if model.ever_loaded else model.failure for model in self.models.values()]
        return failures[0] if None not in failures else None

    @property
    def under_way(self) -> int:
        """Answers that wait or are being written."""
        return sum(model.admission.waiting + model.admission.running for model in self.models.values())

    def explain_absence(self) -> ApiError:
        """503: why not all models can answer."""
        if self.stopping:
            return unavailable("stopping", code="not_ready", retry_after_s=2)
        absent = next((model for model in self.models.values() if not model.available), None)
        if absent is None:
            return unavailable("ready again", code="not_ready", retry_after_s=1)
        error = absent.worker.explain_absence() if absent.failure is None else absent.failure
        return unavailable(error.message, error.hint, code="not_ready", retry_after_s=2)

    def start(self) -> None:
        """Begin to load the models that are loaded from the start."""
        self.residency.start()

    async def close(self) -> None:
        """End all workers."""
        await self.residency.close(_stopping())
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stop_accepting(self) -> None:
        """Answer no more new requests; what is under way goes on."""
        self.stopping = True
        for model in self.models.values():
            model.admission.refuse(_stopping())

    def abort(self) -> None:
        """End what is still under way."""
        for model in self.models.values():
            model.admission.abort(_stopping())

    def find(self, name: str) -> ServedModel:
        """The model of this name; raises ApiError, 404."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model of that name here; there is {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    async def prepare(
        self, model: ServedModel, answers: int, request: Request, work: Callable[..., T], *arguments: Any
    ) -> T:
        """Do what takes a processor for long, such as rendering a template, beside the requests of others.

        Tenants take turns, and none has all threads. What was not begun when the client leaves is not done.

        Args:
            answers: how many are asked for; they count as such from now on.

        Raises:
            ApiError: as `Admission.submit`; or it took too long, or the client left.
        """
        tenant: str = request.state.tenant
        with model.admission.preparing(tenant, answers):
            return await unless_gone(self._prepare(tenant, work, *arguments), request.receive)

    async def _prepare(self, tenant: str, work: Callable[..., T], *arguments: Any) -> T:
        try:
            async with asyncio.timeout(self.limits.queue_s):
                await self._turns.acquire(tenant)
        except TimeoutError:
            waited = f"the answer did not begin within {self.limits.queue_s:g} s"
            raise unavailable(waited, "ask again later", code="queue_timeout") from None
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

        def ended(future: asyncio.Future[T]) -> None:
            self._turns.release(tenant)
            if not future.cancelled():
                future.exception()  # nobody else may be there to take it, and asyncio would print it

        running.add_done_callback(ended)
        await asyncio.wait({running})  # not `shield`, which prints what fails after the client has left (Python 3.14)
        return running.result()

    def generation(
        self, model: ServedModel, prompts: Sequence[tuple[list[int], GenerationConfig]], each: int, state: Any
    ) -> Generation:
        """`each` answers to each prompt; with a seed, every one has a seed of its own.

        Args:
            state: of the request: its id, tenant and beginning.
        """
        jobs = [
            Job(f"{state.request_id}-{number * each + i}", prompt_ids, _with_seed(config, i), state.tenant)
            for number, (prompt_ids, config) in enumerate(prompts)
            for i in range(each)
        ]
        return Generation(jobs, model.admission, self.limits, self.metrics, model.handler.name, state.began)


def _with_seed(config: GenerationConfig, choice: int) -> GenerationConfig:
    return config if config.seed is None else replace(config, seed=config.seed + choice)


def _stopping() -> ApiError:
    return unavailable("the server is shutting down", "ask again later", code="stopping")
