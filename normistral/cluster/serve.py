"""Replicas of `normistral serve` behind Ray Serve, which starts, scales, monitors and replaces them.

    serve run normistral.cluster.serve:build artifact=/models/normistral-int4 replicas=2 threads=8 no_api_key=true

A front without a model takes the requests, checks them, and sends each to the replica that has most likely computed its
beginning already, or to another while that one is full. docs/cluster.md has a configuration for production.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec

from normistral.artifact.artifact import Artifact
from normistral.errors import NormistralError, UsageError, first_line
from normistral.hardware import plan_threads, read_machine
from normistral.ray_runtime import cpu_settings, import_ray, ray_running, threads_per_model
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import ROUND_ROBIN_SLOTS, Batching
from normistral.server.limits import ServerLimits

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_FRONTS_AT_ONCE = 100_000  # the front counts for itself, and refuses in OpenAI's words
_LIMITS = ServerLimits()
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 5.0, 10.0

Count = Annotated[int, msgspec.Meta(ge=1)]


class ServeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a deployment, under these names in a configuration file.

    Attributes:
        artifact: folder or name, on every machine.
        replicas: how many; or between `replicas` and `max_replicas`, as the queue demands.
        threads: of each replica, and so the cores that Ray keeps for it; None divides this machine's.
        slots: answers that a replica writes at once. More wait in Serve's queue, where any replica can take them.
        max_queue: requests that wait; more get 429.
        api_key_file: as `normistral serve` takes it; NORMISTRAL_API_KEYS where it is None.
        no_api_key: let everybody in.
        cache_mib, max_context, max_new_tokens, queue_seconds, request_seconds, grace_seconds: likewise.
    """

    artifact: str
    replicas: Count = 1
    max_replicas: Count | None = None
    threads: Count | None = None
    slots: Count = ROUND_ROBIN_SLOTS
    max_queue: Count = 64
    api_key_file: str | None = None
    no_api_key: bool = False
    device: str = "CPU"
    exact: bool = False
    settings: dict[str, str] = {}
    batching: Batching = "auto"
    cache_mib: Count | None = None
    max_context: Count | None = None
    max_new_tokens: Count | None = None
    queue_seconds: float = _LIMITS.queue_s
    request_seconds: float = _LIMITS.request_s
    grace_seconds: float = _LIMITS.grace_s


def read_options(arguments: Mapping[str, Any]) -> ServeOptions:
    """Options as Serve hands them over: out of a configuration file, or texts out of its command line.

    Raises:
        UsageError: an unknown one, a wrong value, or neither keys nor `no_api_key`.
    """
    try:
        options = msgspec.convert(dict(arguments), ServeOptions, strict=False)
    except msgspec.ValidationError as exc:
        raise UsageError(f"the arguments are wrong: {exc}", "see normistral.cluster.serve.ServeOptions") from exc
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise UsageError(f"max_replicas {options.max_replicas} is less than replicas {options.replicas}", "take more")
    return options


def plan_deployment(options: ServeOptions, threads: int) -> dict[str, Any]:
    """Options of Serve for the deployment of the models."""
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.slots,  # those that wait count too: another replica once any must
            }
        }
    return scale | {
        "name": "models",
        "ray_actor_options": {"num_cpus": threads},
        "max_ongoing_requests": options.slots,
        "max_queued_requests": options.max_queue,
        "graceful_shutdown_timeout_s": options.grace_seconds,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "request_router_config": {"request_router_class": ROUTER},
    }


def build(arguments: dict[str, Any]) -> Any:
    """The application for `serve run` and configuration files; a model's arguments are fields of `ServeOptions`.

    Raises:
        UsageError: as `read_options`.
        NormistralError: the artifact is not there or damaged.
    """
    options = read_options(arguments)
    import_ray(alone=False)
    from ray import serve

    from normistral.cluster.ingress import Ingress
    from normistral.cluster.replica import Replica
    from normistral.server.auth import read_keys
    from normistral.server.startup import EngineOptions

    keys = read_keys(None if options.api_key_file is None else Path(options.api_key_file))
    if bool(keys) == options.no_api_key:
        raise UsageError(
            "there are API keys, and no_api_key" if keys else "there is no API key",
            "give either api_key_file or NORMISTRAL_API_KEYS, or no_api_key=true to let everybody in",
        )
    artifact = Artifact.find(options.artifact, verify=False)
    threads = options.threads or threads_per_model(
        plan_threads(read_machine()), options.max_replicas or options.replicas
    )
    settings = cpu_settings(artifact.manifest.format, options.device, threads, options.settings)
    engine = EngineOptions(
        EngineConfig(options.device, options.exact, settings), options.batching, options.cache_mib, options.slots
    )
    limits = ServerLimits(
        context=options.max_context,
        new_tokens=options.max_new_tokens,
        queue_s=options.queue_seconds,
        request_s=options.request_seconds,
        grace_s=options.grace_seconds,
    )
    models = serve.deployment(**plan_deployment(options, threads))(Replica).bind(
        str(artifact.folder.absolute()), engine, limits, keys
    )
    front = serve.deployment(
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_FRONTS_AT_ONCE,
        graceful_shutdown_timeout_s=options.grace_seconds,
    )(Ingress)
    return front.bind(models, limits, keys, retry_after_s(options))


def retry_after_s(options: ServeOptions) -> float:
    """Retry-After of refused requests: an estimate, as lengths of queued answers are unknown."""
    return max(1.0, options.max_queue / options.slots / options.replicas)


@contextmanager
def serving(options: Mapping[str, Any], port: int = 8000) -> Iterator[str]:
    """Replicas on this machine while the context is open, reached from this machine only; gives their URL.

    Raises:
        NormistralError: Ray cannot be started, or a model not be loaded.
    """
    with ray_running(None, plan_threads(read_machine())):
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": logging.ERROR})
        try:
            serve.run(build(dict(options)), name="normistral", blocking=False)
        except RuntimeError as exc:
            raise NormistralError(f"the replicas do not start: {first_line(exc)}", "see Ray's logs") from exc
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
