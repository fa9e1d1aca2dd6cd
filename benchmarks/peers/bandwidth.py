"""The machine's read bandwidth, whenever it is asked for, in a process in which BLAS has one thread for a call.

    python bandwidth.py THREADS

answers each line on stdin with one of JSON on stdout (fields of `normistral.evaluation.bench.machine.Bandwidth`);
needs normistral.evaluation.bench.machine.SINGLE_THREADED_BLAS in its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from normistral.evaluation.bench.machine import (
    SINGLE_THREADED_BLAS,
    choose_buffer_bytes,
    last_level_cache_bytes,
    measure_read_bandwidth,
)
from normistral.hardware import available_memory_bytes


class BandwidthMeter:
    """The process; use it as a context manager."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, str(Path(__file__)), str(threads)]
        variables = os.environ | SINGLE_THREADED_BLAS
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def gb_per_s(self) -> float:
        """Now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["gb_per_s"])


if __name__ == "__main__":
    buffer_bytes = choose_buffer_bytes(last_level_cache_bytes(), available_memory_bytes())
    for _ in sys.stdin:
        print(json.dumps(asdict(measure_read_bandwidth(int(sys.argv[1]), buffer_bytes))), flush=True)
