"""The machine and process that a benchmark measures: description, memory, read bandwidth, energy.

Process memory is read from /proc on Linux (proc_pid_status(5), proc_pid_smaps_rollup); elsewhere only the peak is
known, if that. Energy is read from the kernel's RAPL counters (Documentation/power/powercap/powercap.rst). They count
whole processor packages, other programs included, and wrap at `max_energy_range_uj`. Since CVE-2020-8694 most systems
let only root read them.

The read bandwidth of memory is the ceiling of decoding, which reads every weight for every token. It is measured by
kernels of numpy, which release the interpreter's lock, one thread each on a part of its own; the best of three
counts, because which one saturates memory depends on the processor. Compared with a loop of AVX2 loads in C:
docs/decisions.md. BLAS has to run on one thread for a call, so this belongs into a process that was started with
`SINGLE_THREADED_BLAS` in its environment.
"""

from __future__ import annotations

import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
SINGLE_THREADED_BLAS = dict.fromkeys(_BLAS_THREADS, "1")
MIN_BUFFER_BYTES = 512 * 2**20  # a virtual machine may hide how large the cache is
_CACHES = 4  # times the last-level cache: what is left of the pass before is then next to nothing
_MEMORY_SHARE = 4  # a fourth of the available memory at most
_PASSES = 6
_PAGE_BYTES = 4096
_STEADY = 0.1  # memory of virtual machines changes its speed within a minute, by half and more

Floats = NDArray[np.float32]
_KERNELS: dict[str, Callable[[Floats], Any]] = {
    "largest float32": lambda part: part.max(),
    "or of int64": lambda part: np.bitwise_or.reduce(part.view(np.int64)),
    "dot of float32": lambda part: np.dot(part, part),
}


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """One measurement.

    Attributes:
        gb_per_s: bytes read in a second, in 10^9, by the best kernel's best pass.
        kernel: its name.
        kernels: the best pass of each.
    """

    threads: int
    buffer_bytes: int
    gb_per_s: float
    kernel: str
    kernels: dict[str, float]


def choose_buffer_bytes(last_level_cache_bytes: int, available_bytes: int) -> int:
    """At least four times the cache and 512 MiB, or as much as a fourth of the memory allows."""
    wanted = max(MIN_BUFFER_BYTES, _CACHES * last_level_cache_bytes)
    return max(_PAGE_BYTES, min(wanted, available_bytes // _MEMORY_SHARE))


def is_steady(before: float, after: float) -> bool:
    """True if the bandwidths before and after a measurement agree within 10 %: else it mixes two speeds of memory."""
    return abs(before - after) <= _STEADY * max(before, after)


def last_level_cache_bytes(root: Path = Path("/")) -> int:
    """Bytes of all last-level caches together; 0 where the system does not tell.

    Linux says per CPU which caches it has and who shares them (Documentation/ABI/testing/sysfs-devices-system-cpu).
    """
    caches: dict[tuple[int, str], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, kind = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "size", "type")
            )
            shared = (index / "shared_cpu_list").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if kind != "Instruction" and level.isdigit() and size.removesuffix("K").isdigit():
            caches[int(level), shared] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last)


def measure_read_bandwidth(threads: int, buffer_bytes: int, passes: int = _PASSES) -> Bandwidth:
    """Read a buffer with so many threads, several times with each kernel."""
    part_bytes = max(_PAGE_BYTES, buffer_bytes // threads // _PAGE_BYTES * _PAGE_BYTES)
    with ThreadPoolExecutor(threads) as pool:
        # Written by the thread that reads it: the memory is then there, and on that thread's node.
        parts = list(pool.map(lambda _: np.ones(part_bytes // 4, np.float32), range(threads)))
        kernels = {name: _best_pass(pool, kernel, parts, passes) / 1e9 for name, kernel in _KERNELS.items()}
    best = max(kernels, key=lambda name: kernels[name])
    return Bandwidth(threads, part_bytes * threads, kernels[best], best, kernels)


def _best_pass(pool: ThreadPoolExecutor, kernel: Callable[[Floats], Any], parts: list[Floats], passes: int) -> float:
    """Bytes in a second of the fastest pass, from the moment the first thread begins until the last one is done.

    The threads look at the clock themselves: where they take every core, a thread that only watches wakes late, and a
    pass would seem shorter than it was.
    """
    barrier = threading.Barrier(len(parts))

    def read(part: Floats) -> list[tuple[float, float]]:
        spans = []
        for _ in range(passes):
            barrier.wait()
            start = time.perf_counter()
            kernel(part)
            spans.append((start, time.perf_counter()))
        return spans

    running = [pool.submit(read, part) for part in parts]
    fastest_s = min(_elapsed(spans) for spans in zip(*(future.result() for future in running), strict=True))
    return sum(part.nbytes for part in parts) / fastest_s


def _elapsed(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds from the first beginning to the last end."""
    starts, ends = zip(*spans, strict=True)
    return float(max(ends) - min(starts))
