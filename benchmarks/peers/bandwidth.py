"""How fast this machine reads memory: the ceiling of decoding, which reads every weight for every token.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bandwidth.py THREADS

prints {kernel: GB/s} of three numpy kernels, which release the interpreter's lock; each thread reads a part of its own.
Which of them saturates memory depends on the processor, so the best one counts. To be replaced by
normistral.evaluation.bandwidth, which `normistral bench` measures with.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUFFER_BYTES = 1 << 30  # far above any cache
PASSES = 6
KERNELS: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "largest float32": lambda part: part.max(),
    "or of int64": lambda part: np.bitwise_or.reduce(part.view(np.int64)),
    "dot of float32": lambda part: np.dot(part, part),
}


def measure(threads: int) -> dict[str, float]:
    """GB/s (10^9 bytes) of each kernel's best pass."""
    with ThreadPoolExecutor(threads) as pool:
        # Written by the thread that reads it: the memory is then there, and on that thread's node.
        parts = list(pool.map(lambda _: np.ones(BUFFER_BYTES // threads // 4, np.float32), range(threads)))
        return {name: best_pass(pool, kernel, parts) for name, kernel in KERNELS.items()}


def best_pass(
    pool: ThreadPoolExecutor, kernel: Callable[[NDArray[np.float32]], Any], parts: list[NDArray[np.float32]]
) -> float:
    barrier = threading.Barrier(len(parts) + 1)

    def read(part: NDArray[np.float32]) -> None:
        for _ in range(PASSES):
            barrier.wait()
            kernel(part)
            barrier.wait()

    running = [pool.submit(read, part) for part in parts]
    fastest_s = float("inf")
    for _ in range(PASSES):
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        fastest_s = min(fastest_s, time.perf_counter() - started)
    for future in running:
        future.result()
    return sum(part.nbytes for part in parts) / fastest_s / 1e9


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
