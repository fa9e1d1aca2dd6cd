"""Read bandwidth of memory: the ceiling of decoding, which reads every weight for every token.

Kernels of numpy, which release the interpreter's lock, one thread each on a part of its own; the best of three
counts, because which one saturates memory depends on the processor. Compared with a loop of AVX2 loads in C:
docs/decisions.md. BLAS has to run on one thread for a call, so this belongs into a process that was started with
`SINGLE_THREADED_BLAS` in its environment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
