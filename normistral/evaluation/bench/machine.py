"""The machine and the versions that a report names."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from normistral.evaluation.bandwidth import last_level_cache_bytes
from normistral.hardware import plan_threads, read_machine

_PACKAGES = ("normistral", "openvino", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class MachineReport:
    """What figures depend on.

    Attributes:
        cpu_quota: CPU seconds per second that a container allows; None is no limit.
        planned_threads: how many the engines compute with unless settings say otherwise.
        last_level_cache_bytes: 0 where the system does not tell.
    """

    cpu: str
    physical_cores: int
    logical_cpus: int
    cpu_quota: float | None
    planned_threads: int
    instruction_sets: tuple[str, ...]
    total_memory_bytes: int
    available_memory_bytes: int
    last_level_cache_bytes: int
    system: str
    python: str
    versions: dict[str, str]


def report_machine() -> MachineReport:
    """Look at this machine."""
    machine = read_machine()
    return MachineReport(
        cpu=machine.cpu,
        physical_cores=machine.physical_cores,
        logical_cpus=machine.logical_cpus,
        cpu_quota=machine.cpu_quota,
        planned_threads=plan_threads(machine),
        instruction_sets=tuple(sorted(machine.instruction_sets)),
        total_memory_bytes=machine.total_memory_bytes,
        available_memory_bytes=machine.available_memory_bytes,
        last_level_cache_bytes=last_level_cache_bytes(),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))},
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
