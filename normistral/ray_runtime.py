"""Import and start of Ray: usage report off, loopback only; processors per model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from normistral.errors import MissingExtraError, NormistralError, UsageError, first_line, install_extra
from normistral.telemetry import silence_telemetry

# Only places of rows and requests on their way go through it; Ray would take 30 % of the memory.
OBJECT_STORE_BYTES = 200 * 2**20
# Read when Ray is imported. Named after the systems where it is Ray's default, it makes a cluster of one machine listen
# on loopback; otherwise its processes (scheduler, agents, workers) take connections from everywhere.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def import_ray(*, alone: bool) -> Any:
    """The module; its usage report is off, here and in what it starts.

    Args:
        alone: a cluster that it starts is for this machine only.

    Raises:
        MissingExtraError: it is not installed.
    """
    silence_telemetry()
    if alone:
        os.environ.update(_ALONE)
    try:
        import ray
    except ImportError as exc:
        raise MissingExtraError("Ray is not installed", install_extra("ray")) from exc
    return ray


@contextmanager
def ray_running(address: str | None, cores: int) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of `cores` here that lives as long as the context.

    One that the application has started stays, and is used.

    Raises:
        MissingExtraError: it is not installed.
        NormistralError: there is no cluster at `address`, or it cannot be started.
    """
    ray = import_ray(alone=address is None)
    if ray.is_initialized():
        yield ray
        return
    here = {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else here),
        )
    except (OSError, RuntimeError, ValueError) as exc:
        where = f"connect to Ray at {address}" if address else "start Ray"
        raise NormistralError(f"cannot {where}: {first_line(exc)}", "see `ray status`") from exc
    try:
        yield ray
    finally:
        ray.shutdown()


def threads_per_model(cores: int, models: int) -> int:
    """Threads of each of `models` on `cores`.

    Raises:
        UsageError: more models than cores.
    """
    if models > cores:
        raise UsageError(f"{models} models cannot share {cores} cores", f"take {cores} or fewer")
    return cores // models


def cpu_settings(format: str, device: str, threads: int, given: Mapping[str, str]) -> dict[str, str]:
    """Engine settings for a number of threads; given settings take precedence.

    OpenVINO binds its threads to cores, counted from the first: two processes would sit on the same ones.
    """
    if device != "CPU":
        return dict(given)
    ours = (
        {"INFERENCE_NUM_THREADS": str(threads), "ENABLE_CPU_PINNING": "NO"}
        if format == "openvino"
        else {"intra_op_num_threads": str(threads)}
    )
    return ours | dict(given)
