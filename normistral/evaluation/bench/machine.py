"""The machine and process that a benchmark measures: description, memory, energy.

Process memory is read from /proc on Linux (proc_pid_status(5), proc_pid_smaps_rollup); elsewhere only the peak is
known, if that. Energy is read from the kernel's RAPL counters (Documentation/power/powercap/powercap.rst). They count
whole processor packages, other programs included, and wrap at `max_energy_range_uj`. Since CVE-2020-8694 most systems
let only root read them.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from normistral.evaluation.bench.bandwidth import last_level_cache_bytes
from normistral.hardware import plan_threads, read_machine

_PACKAGES = ("normistral", "openvino", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")
_RAPL_PACKAGE = re.compile(r"^intel-rapl:\d+$")  # AMD's too; intel-rapl:0:0 is a part of intel-rapl:0


@dataclass(frozen=True, slots=True)
class MachineReport:
    """Machine and versions.

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


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes; None where the system does not tell.

    Attributes:
        peak: most memory that was resident at any time, mapped files included.
        resident: now.
        anonymous: of `resident`, what is no mapped file.
        proportional: `resident`, with pages that other processes share counted in part.
    """

    peak: int | None
    resident: int | None
    anonymous: int | None
    proportional: int | None


def read_process_memory(root: Path = Path("/")) -> ProcessMemory:
    """Look at this process."""
    status = _read_kilobytes(root / "proc/self/status")
    if "VmHWM" not in status:
        return ProcessMemory(_peak_elsewhere(), None, None, None)
    return ProcessMemory(
        peak=status["VmHWM"],
        resident=status.get("VmRSS"),
        anonymous=status.get("RssAnon"),
        proportional=_read_kilobytes(root / "proc/self/smaps_rollup").get("Pss"),
    )


def _read_kilobytes(path: Path) -> dict[str, int]:
    """Lines such as `VmHWM:   123 kB`, in bytes."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = [line.replace(":", " ").split() for line in lines]
    return {row[0]: int(row[1]) * 1024 for row in fields if len(row) == 3 and row[2] == "kB"}


def _peak_elsewhere() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): macOS counts bytes


class EnergyCounter:
    """The packages' counters; make one with `find_energy_counter`."""

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._ranges = [_read_count(package / "max_energy_range_uj") for package in packages]

    def read(self) -> tuple[int, ...]:
        """Microjoules of each package so far, to be given to `joules_between`.

        Raises:
            OSError: a counter can no longer be read.
        """
        return tuple(_read_count(package / "energy_uj") for package in self._packages)

    def joules_between(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Joules of all packages together; a counter may have begun again once."""
        microjoules = 0
        for start, end, wrap in zip(before, after, self._ranges, strict=True):
            microjoules += end - start if end >= start else end + wrap - start
        return microjoules / 1e6


def find_energy_counter(root: Path = Path("/")) -> EnergyCounter | str:
    """The machine's counter, or why there is none."""
    folder = root / "sys/class/powercap"
    if not folder.is_dir():
        return "not exposed by this machine"
    packages = sorted(path for path in folder.iterdir() if _RAPL_PACKAGE.match(path.name))
    if not packages:
        return "not exposed by this machine"
    try:
        counter = EnergyCounter(packages)
        counter.read()
    except PermissionError:
        return "not readable by this user"
    except (OSError, ValueError):
        return "not exposed by this machine"
    return counter


def _read_count(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
