"""Read bandwidth: how large the buffer is, what the caches are, and that every kernel reads."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from normistral.evaluation.bench.machine import (
    _KERNELS,
    MIN_BUFFER_BYTES,
    _best_pass,
    _elapsed,
    choose_buffer_bytes,
    last_level_cache_bytes,
    measure_read_bandwidth,
)

MIB = 2**20


@pytest.mark.parametrize(
    ("cache", "available", "expected"),
    [
        (32 * MIB, 16_384 * MIB, MIN_BUFFER_BYTES),  # the least
        (384 * MIB, 16_384 * MIB, 4 * 384 * MIB),  # four caches
        (384 * MIB, 4_096 * MIB, 1_024 * MIB),  # a fourth of the memory
        (0, 16_384 * MIB, MIN_BUFFER_BYTES),  # not told
        (32 * MIB, 0, 4096),  # never nothing
    ],
)
def test_the_buffer_is_four_caches_as_far_as_memory_allows(cache, available, expected):
    assert choose_buffer_bytes(cache, available) == expected


def write_cache(root, cpu, index, level, kind, size, shared):
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    folder.mkdir(parents=True)
    for name, text in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
        (folder / name).write_text(f"{text}\n")


def test_last_level_caches_are_added_and_counted_once(tmp_path):
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        write_cache(tmp_path, cpu, 0, 1, "Data", "48K", cpu)
        write_cache(tmp_path, cpu, 1, 1, "Instruction", "64K", cpu)
        write_cache(tmp_path, cpu, 2, 3, "Unified", "32768K", shared)
    assert last_level_cache_bytes(tmp_path) == 2 * 32 * MIB


def test_no_caches_told_is_zero(tmp_path):
    assert last_level_cache_bytes(tmp_path) == 0


def test_the_best_kernel_counts_and_the_buffer_is_shared_out():
    measured = measure_read_bandwidth(3, 3 * MIB, passes=2)
    assert (measured.threads, measured.buffer_bytes) == (3, 3 * MIB)
    assert measured.kernels.keys() == _KERNELS.keys()
    assert measured.gb_per_s == measured.kernels[measured.kernel] == max(measured.kernels.values()) > 0


def test_a_pass_lasts_from_the_first_beginning_to_the_last_end():
    assert _elapsed([(1.0, 3.0), (2.0, 7.0)]) == 6.0  # the second began late: its time counts too
    assert _elapsed([(1.0, 9.0), (2.0, 7.0)]) == 8.0


def test_a_pass_is_never_shorter_than_its_kernel():
    def work(part):
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass

    parts = [np.ones(1024, np.float32)] * 4  # more threads than most machines of a test have cores to spare
    with ThreadPoolExecutor(4) as pool:
        assert _best_pass(pool, work, parts, passes=3) <= 4 * 4096 / 0.002


@pytest.mark.parametrize("name", _KERNELS)
def test_a_kernel_reads_all_of_its_part(name):
    # A change anywhere changes the result: nothing is skipped.
    part = np.ones(MIB, np.float32)
    before = _KERNELS[name](part)
    part[-1] = 3.0
    assert _KERNELS[name](part) != before


def test_blas_is_told_to_use_one_thread_in_time():
    script = (
        "import sys\nassert 'numpy' not in sys.modules\n"
        "from normistral.evaluation.bench.worker import Measurer, Worker\n"
        "from normistral.evaluation.bench.machine import SINGLE_THREADED_BLAS\n"
        "with Worker('x', SINGLE_THREADED_BLAS) as worker:\n"
        "    found = worker.ask(Measurer.read_bandwidth, 1, 2**20)\n"
        "    environ = open(f'/proc/{worker._process.pid}/environ').read()\n"
        "assert 'OPENBLAS_NUM_THREADS=1' in environ and found.gb_per_s > 0\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("looks into /proc")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
