"""Models of a server, and which of them are in memory: loaded when they are asked for, and unloaded for others.

    unloaded -> loading -> loaded -> unloading -> unloaded
                loading -> unloading -> failed    (tried again when it is asked for after a while)

A model's memory counts from the start of its process until that process has ended, so no two loads together exceed the
budget. Where there is no room, the model that was used least recently goes, and never one that is answering: if all
are busy, one that had its turn gets no new answers until those it writes have ended. The models that wait come in the
order in which they were asked for. Everything runs on the event loop; `_decide` is the only place that decides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from normistral.errors import EngineError, NormistralError
from normistral.runtime.options import GenerationConfig
from normistral.server.admission import Admission
from normistral.server.backends.base import CONTINUOUS
from normistral.server.errors import ApiError, unavailable
from normistral.server.limits import GIB, ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.model_handler import ModelHandler
from normistral.server.worker_client import WORKER_MODULE, WorkerClient

logger = logging.getLogger(__name__)

State = Literal["unloaded", "loading", "loaded", "unloading", "failed"]

_TURN_S = 5.0  # that a loaded model answers before it makes room for others, and twice as long as it took to load
_PAUSE_S = 0.5  # without a request, after which it makes room before that: a client that sends its next one is quicker
_RETRY_S = 30.0  # after a failed load


@dataclass(frozen=True, slots=True)
class ResidencyOptions:
    """How many models are in memory.

    Attributes:
        budget_bytes: for all that are loaded; None is no limit.
        idle_s: after which one that nobody asks is unloaded; None is never.
        on_demand: names of models that are not loaded at the start, though there were room.
    """

    budget_bytes: int | None = None
    idle_s: float | None = None
    on_demand: frozenset[str] = frozenset()


class ServedModel:
    """An artifact, its worker, and who waits for it.

    Attributes:
        state: of its worker process; a loaded one that died is loaded again by itself.
        failure: why it could not be loaded; None before that, and once it is loaded.
        keep_s: overrides `ResidencyOptions.idle_s`, until the next request that says so.
    """

    def __init__(
        self,
        handler: ModelHandler,
        limits: ServerLimits,
        metrics: Metrics,
        worker_module: str,
        on_change: Callable[[ServedModel], None],
        *,
        several: bool,
    ) -> None:
        self.handler = handler
        self.worker = WorkerClient(handler.name, handler.load, worker_module, self._on_worker_change)
        self.admission = Admission(
            self.worker, limits, self._require_reachable, lambda: on_change(self), several=several
        )
        self.state: State = "unloaded"
        self.failure: NormistralError | None = None
        self.keep_s: float | None = None
        self.retry_at = -math.inf
        self.wanted_since: float | None = None
        self.idle_since: float | None = None
        self.began_at = self.loaded_at = time.monotonic()
        self.load_s = 0.0
        self.demanded = False  # its load was asked for by a request
        self.ever_loaded = False
        self.asks: set[asyncio.Future[None]] = set()  # who waits for it to be loaded, without an answer to write
        self._arithmetic: str | None = None
        self._together = False
        self._on_change = on_change
        self._restarts = metrics.worker_restarts.labels(handler.name)
        self._counted = 0
        metrics.watch(
            handler.name,
            lambda: self.admission.waiting,
            lambda: self.admission.running,
            lambda: int(self.worker.loaded is not None),
        )

    @property
    def available(self) -> bool:
        """Whether a request is answered, perhaps after a load that requests ask for."""
        if self.state in ("loading", "loaded"):
            return self.worker.loaded is not None or (self.demanded and self.state == "loading")
        return self.failure is None

    @property
    def wanted(self) -> bool:
        """Somebody waits for it."""
        return bool(self.admission.waiting or self.asks)

    @property
    def busy(self) -> bool:
        """It answers, or somebody waits for it."""
        return self.wanted or bool(self.admission.running or self.admission.preparing_answers)

    @property
    def described_state(self) -> str:
        """The state as clients see it."""
        if self.state == "loaded" and self.worker.loaded is None:
            return "loading"
        return self.state

    @property
    def turn_ends_at(self) -> float:
        """`time.monotonic()` from which on it may be made to wait for others."""
        return self.loaded_at + max(_TURN_S, 2 * self.load_s)

    def may_go(self, now: float) -> bool:
        """Whether it can be unloaded for others now."""
        if self.admission.running:
            return False
        if now >= self.turn_ends_at:
            return True
        return not self.busy and self.idle_since is not None and now - self.idle_since >= _PAUSE_S

    def note_use(self, now: float) -> None:
        """Note since when it is idle, or wanted."""
        self.idle_since = None if self.busy else self.idle_since or now
        self.wanted_since = (self.wanted_since or now) if self.wanted else None

    def fingerprint(self, config: GenerationConfig) -> str | None:
        """Names weights and arithmetic: while it is the same, a seed gives the same text again.

        None for an answer that is computed together with others: their number changes the last bits of its logits.
        """
        if self._arithmetic is None or (self._together and not config.reproducible):
            return None
        return self.handler.fingerprint(self._arithmetic)

    def _require_reachable(self) -> None:
        if self.state == "failed":
            assert self.failure is not None
            wait_s = self.retry_at - time.monotonic()
            if wait_s > 0:
                raise load_refusal(self.handler.name, self.failure, wait_s)
        elif self.state == "loaded" and self.worker.loaded is None:
            raise self.worker.explain_absence()

    def _on_worker_change(self) -> None:
        self._restarts.inc(self.worker.restarts - self._counted)
        self._counted = self.worker.restarts
        loaded = self.worker.loaded
        if loaded is not None:  # the last answers are sent after it may have been unloaded
            self._arithmetic, self._together = loaded.arithmetic, loaded.batching == CONTINUOUS
        self._on_change(self)
        self.admission.pump()


class Residency:
    """Loads and unloads the models of a server.

    Args:
        handlers: of the models.
        several: there may be several tenants.

    Attributes:
        started: what is loaded from the start is being loaded, at least.
    """

    def __init__(
        self,
        handlers: Sequence[ModelHandler],
        options: ResidencyOptions,
        limits: ServerLimits,
        metrics: Metrics,
        worker_module: str = WORKER_MODULE,
        *,
        several: bool = True,
    ) -> None:
        self.options = options
        self.started = False
        self.models = {
            one.name: ServedModel(one, limits, metrics, worker_module, self._notice, several=several)
            for one in handlers
        }
        self._budget = math.inf if options.budget_bytes is None else options.budget_bytes
        self._metrics, self._queue_s = metrics, limits.queue_s
        self._keep_asked = not several
        self._ending: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to load, in their order and as far as there is room, those that are not on demand."""
        for name, model in self.models.items():
            if model.handler.memory_bytes > self._budget:
                model.state, model.failure, model.retry_at = "failed", self._explain_size(model), math.inf
                logger.error("%s: %s", name, model.failure.message)
            elif name not in self.options.on_demand and model.handler.memory_bytes <= self._free_bytes():
                self._load(model)
        self.started = True

    async def close(self, error: ApiError) -> None:
        """End all workers; who waits gets the error."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for model in self.models.values():
            model.admission.abort(error)
            self._answer_asks(model, error)
        await asyncio.gather(*(model.worker.close() for model in self.models.values()), *self._ending)

    async def load(self, model: ServedModel) -> None:
        """Wait until a model is loaded; raises ApiError if it is not in time, or cannot be."""
        model.admission.require_reachable()
        if model.worker.loaded is not None:
            return
        asked = asyncio.get_running_loop().create_future()
        model.asks.add(asked)
        self._notice(model)
        try:
            async with asyncio.timeout(self._queue_s):
                await asked
        except TimeoutError:
            raise model.admission.explain_wait() from None
        finally:
            model.asks.discard(asked)
            self._notice(model)

    def keep(self, model: ServedModel, keep_s: float | None) -> bool:
        """Unload a model after it was idle for so long; None is as the server's options say, infinity never.

        Without effect where models stay loaded, or several keys share them: it would be one's word against another's.

        Returns:
            whether it has an effect.
        """
        if not self._keep_asked or self.options.idle_s is None:
            return False
        model.keep_s = keep_s
        self._notice(model)
        return True

    def expires_in_s(self, model: ServedModel) -> float | None:
        """Seconds after which a model is unloaded if nobody asks it; None is never."""
        idle_s = self._idle_s(model)
        if idle_s is None:
            return None
        return idle_s if model.idle_since is None else max(0.0, model.idle_since + idle_s - time.monotonic())

    def _idle_s(self, model: ServedModel) -> float | None:
        idle_s = self.options.idle_s if model.keep_s is None else model.keep_s
        return None if idle_s in (None, math.inf) else idle_s

    def _notice(self, model: ServedModel) -> None:
        """Something has happened to a model: decide in the next turn of the event loop."""
        if self._closed:
            return
        if model.state == "loading":
            self._follow_load(model)
        model.note_use(time.monotonic())
        self._decide_in(0.0)

    def _follow_load(self, model: ServedModel) -> None:
        if model.worker.loaded is not None:
            now = time.monotonic()
            model.state, model.failure, model.ever_loaded = "loaded", None, True
            model.loaded_at, model.load_s, model.idle_since = now, now - model.began_at, now
            self._metrics.load_seconds.labels(model.handler.name).observe(model.load_s)
            self._answer_asks(model, None)
        elif model.worker.failure is not None:
            self._fail(model, model.worker.failure)
        elif model.worker.last_end is not None and (model.demanded or len(self.models) > 1):
            ended = EngineError(f"its process ended while it loaded ({model.worker.last_end})", "ask again later")
            self._fail(model, ended)

    def _fail(self, model: ServedModel, error: NormistralError) -> None:
        model.failure, model.retry_at = error, time.monotonic() + _RETRY_S
        refusal = load_refusal(model.handler.name, error, _RETRY_S)
        model.admission.fail_waiting(refusal)
        self._answer_asks(model, refusal)
        self._unload(model, "failed")

    def _answer_asks(self, model: ServedModel, error: ApiError | None) -> None:
        for asked in model.asks:
            if not asked.done():
                if error is None:
                    asked.set_result(None)
                else:
                    asked.set_exception(error)

    def _decide_in(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay_s, self._decide) if delay_s else loop.call_soon(self._decide)

    def _decide(self) -> None:
        """Load what is asked for and has room, make room for the next, and unload what is idle."""
        self._timer = None
        now = time.monotonic()
        models = self.models.values()
        waiting = [model for model in models if model.wanted and model.state in ("unloaded", "failed")]
        held: set[ServedModel] = set()
        for model in sorted(waiting, key=lambda model: model.wanted_since or now):
            if model.handler.memory_bytes > self._free_bytes():
                held = self._make_room(model, now)
                break
            self._load(model, demanded=True)
        for model in models:
            model.admission.hold(model in held or model.state == "unloading")
            idle_s = self._idle_s(model)
            if model.state == "loaded" and not model.busy and idle_s is not None:
                assert model.idle_since is not None
                if now - model.idle_since >= idle_s:
                    self._unload(model, "idle")
        moments = [moment for model in models for moment in self._next_moments(model, needed=bool(waiting))]
        if coming := [moment for moment in moments if moment > now]:
            self._decide_in(min(coming) - now)

    def _next_moments(self, model: ServedModel, *, needed: bool) -> list[float]:
        """When a loaded model may be unloaded, if nothing happens before."""
        if model.state != "loaded":
            return []
        moments = [model.turn_ends_at] if needed else []
        if model.idle_since is not None:
            idle_s = self._idle_s(model)
            moments += [model.idle_since + _PAUSE_S] if needed else []
            moments += [] if idle_s is None else [model.idle_since + idle_s]
        return moments

    def _make_room(self, wanted: ServedModel, now: float) -> set[ServedModel]:
        """Unload idle models, the least recently used first; returns those that get no new answers until they are."""
        models = self.models.values()
        missing = wanted.handler.memory_bytes - self._free_bytes()
        missing -= sum(model.handler.memory_bytes for model in models if model.state == "unloading")
        held: set[ServedModel] = set()

        def order(model: ServedModel) -> tuple[bool, bool, float]:
            idle = model.idle_since is not None
            return not idle, not model.admission.held, (model.idle_since if idle else None) or model.loaded_at

        for model in sorted((model for model in models if model.state == "loaded"), key=order):
            if missing <= 0:
                break
            if model.may_go(now):
                self._unload(model, "memory")
            elif now >= model.turn_ends_at:
                held.add(model)
            else:
                continue
            missing -= model.handler.memory_bytes
        return held

    def _load(self, model: ServedModel, *, demanded: bool = False) -> None:
        model.state, model.demanded, model.began_at = "loading", demanded, time.monotonic()
        self._metrics.loads.labels(model.handler.name).inc()
        logger.info("%s: loading", model.handler.name)
        model.worker.start()

    def _unload(self, model: ServedModel, reason: str) -> None:
        model.state = "unloading"
        model.admission.hold(True)
        self._metrics.unloads.labels(model.handler.name, reason).inc()
        logger.info("%s: unloading (%s)", model.handler.name, reason)
        task = asyncio.get_running_loop().create_task(self._end(model, "failed" if reason == "failed" else "unloaded"))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, model: ServedModel, state: State) -> None:
        await model.worker.close()
        model.state, model.wanted_since = state, None  # who waits for it comes after the others
        self._notice(model)

    def _free_bytes(self) -> float:
        in_memory = ("loading", "loaded", "unloading")
        return self._budget - sum(
            model.handler.memory_bytes for model in self.models.values() if model.state in in_memory
        )

    def _explain_size(self, model: ServedModel) -> EngineError:
        return EngineError(
            f"it takes up to {model.handler.memory_bytes / GIB:.2f} GiB with its KV cache, and loaded models may take "
            f"{self._budget / GIB:.2f} GiB",
            "whoever runs the server can give --memory-mib more, or --cache-mib or --max-context less",
        )


def load_refusal(name: str, error: NormistralError, wait_s: float) -> ApiError:
    """503: a model could not be loaded."""
    retry_s = min(wait_s, 3600.0)
    return unavailable(
        f"{name} could not be loaded: {error.message}", error.hint, code="not_loaded", retry_after_s=retry_s
    )
