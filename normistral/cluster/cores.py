"""Every model its own cores: two that both take the whole machine slow each other down more than twice."""

from __future__ import annotations

from collections.abc import Mapping

from normistral.errors import UsageError


def threads_of_each(cores: int, models: int) -> int:
    """How many threads each of `models` has where there are `cores`.

    Raises:
        UsageError: more models than cores.
    """
    if models > cores:
        raise UsageError(f"{models} models cannot share {cores} cores", f"take {cores} or fewer")
    return cores // models


def share_of_cores(format: str, device: str, threads: int, given: Mapping[str, str]) -> dict[str, str]:
    """Engine settings for a model that has so many threads; those that were given stay.

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
