"""Prometheus metrics; labels never hold text of requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SPEEDS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)


class Metrics:
    """Metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered, by route and status.", "route", "status")
        self.rejected = self._counter("rejected_requests", "Requests refused, by reason.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.", "model")
        self.cached_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that were not computed again.", "model"
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens written.", "model")
        self.cancelled = self._counter("cancelled_answers", "Answers given up because their reader left.", "model")
        self.worker_restarts = self._counter("worker_restarts", "Worker processes that died.", "model")
        self.loads = self._counter("model_loads", "Times that a model was loaded.", "model")
        self.unloads = self._counter("model_unloads", "Times that a model was unloaded, by reason.", "model", "reason")
        self.load_seconds = self._histogram("model_load_seconds", "From the start of a load to its end.", _SECONDS)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to the first token of an answer.", _SECONDS
        )
        self.speed = self._histogram(
            "answer_tokens_per_second", "Tokens per second of an answer, after its first.", _SPEEDS
        )
        self.queued = self._gauge("queued_answers", "Answers that wait for their turn.")
        self.running = self._gauge("running_answers", "Answers that are being written.")
        self.ready = self._gauge("model_ready", "1 while a model can answer.")

    def watch(
        self, model: str, queued: Callable[[], int], running: Callable[[], int], ready: Callable[[], int]
    ) -> None:
        """Register callbacks for a model's gauges."""
        for gauge, read in ((self.queued, queued), (self.running, running), (self.ready, ready)):
            gauge.labels(model).set_function(read)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"normistral_{name}", description, labels, registry=self._registry)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"normistral_{name}", description, ("model",), registry=self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"normistral_{name}", description, ("model",), registry=self._registry, buckets=buckets)
