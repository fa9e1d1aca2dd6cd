"""The machine plan, from folders that look like the /proc and /sys of other machines."""

import dataclasses
import os
from pathlib import Path

import pytest

from normistral.hardware import (
    Machine,
    available_memory_bytes,
    exact_openvino,
    free_disk_bytes,
    plan_openvino,
    plan_threads,
    read_machine,
)

GIB = 2**30
XEON = Machine(
    cpu="Intel Xeon",
    physical_cores=4,
    logical_cpus=8,
    cpu_quota=None,
    instruction_sets=frozenset({"avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16"}),
    total_memory_bytes=16 * GIB,
    available_memory_bytes=12 * GIB,
)


class FakeLinux:
    """Writes the files that `read_machine` reads; paths are given without the leading slash."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def cpus(
        self, count: int, *, threads_per_core: int = 1, allowed: str | None = None, flags: str = "avx2 fma"
    ) -> None:
        block = "processor\t: {}\nmodel name\t: Prøve CPU\nflags\t\t: fpu {}\n\n"
        self.write("proc/cpuinfo", "".join(block.format(cpu, flags) for cpu in range(count)))
        self.write("proc/self/status", f"Name:\tpython\nCpus_allowed_list:\t{allowed or f'0-{count - 1}'}\n")
        for cpu in range(count):
            first = cpu - cpu % threads_per_core
            siblings = f"{first}-{first + threads_per_core - 1}" if threads_per_core > 1 else str(first)
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings + "\n")

    def memory(self, total: int, available: int) -> None:
        self.write(
            "proc/meminfo", f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
        )

    def v2(self, group: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{group}\n")
        self.write(
            "proc/self/mountinfo",
            "24 1 0:21 / /proc rw - proc proc rw\n"
            f"31 23 0:28 {mount_root} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
        )

    def v1(self, group: str, mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"4:memory:{group}\n2:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            f"32 31 0:29 {mount_root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "36 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        )


@pytest.fixture
def linux(tmp_path: Path) -> FakeLinux:
    fake = FakeLinux(tmp_path)
    fake.cpus(8)
    fake.memory(16 * GIB, 10 * GIB)
    return fake


def test_a_machine_without_limits(linux: FakeLinux) -> None:
    machine = read_machine(linux.root)
    assert machine == Machine("Prøve CPU", 8, 8, None, frozenset({"avx2", "fma"}), 16 * GIB, 10 * GIB)
    assert plan_threads(machine) == 8


def test_hyper_threads_of_one_core_count_once(linux: FakeLinux) -> None:
    linux.cpus(8, threads_per_core=2)
    machine = read_machine(linux.root)
    assert (machine.physical_cores, machine.logical_cpus, plan_threads(machine)) == (4, 8, 4)


@pytest.mark.parametrize(
    ("allowed", "logical", "cores"),
    [("1", 1, 1), ("0-1", 2, 1), ("0,2", 2, 2), ("1-2,4,6-7", 5, 4)],
)
def test_affinity_leaves_fewer_cores(linux: FakeLinux, allowed: str, logical: int, cores: int) -> None:
    linux.cpus(8, threads_per_core=2, allowed=allowed)
    machine = read_machine(linux.root)
    assert (machine.logical_cpus, machine.physical_cores) == (logical, cores)


def test_missing_topology_counts_every_cpu_as_a_core(tmp_path: Path) -> None:
    linux = FakeLinux(tmp_path)
    linux.write("proc/cpuinfo", "processor : 0\nprocessor : 1\nprocessor : 2\n")
    machine = read_machine(tmp_path)
    assert (machine.logical_cpus, machine.physical_cores, machine.cpu_quota) == (3, 3, None)
    assert machine.instruction_sets == frozenset()


@pytest.mark.parametrize(
    ("quota", "threads"),
    [(0.1, 1), (0.5, 1), (1.0, 1), (1.4, 1), (1.5, 2), (2.0, 2), (2.4, 2), (3.5, 4), (4.2, 4), (64.0, 8)],
)
def test_threads_follow_the_quota(linux: FakeLinux, quota: float, threads: int) -> None:
    linux.v2("/")
    linux.write("sys/fs/cgroup/cpu.max", f"{round(quota * 100_000)} 100000\n")
    machine = read_machine(linux.root)
    assert machine.cpu_quota == pytest.approx(quota)
    assert plan_threads(machine) == threads


def test_v2_takes_the_tightest_limit_on_the_way_up(linux: FakeLinux) -> None:
    linux.v2("/outer/inner")
    linux.write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    linux.write("sys/fs/cgroup/outer/inner/memory.max", "max\n")
    linux.write("sys/fs/cgroup/outer/inner/memory.current", f"{GIB}\n")
    linux.write("sys/fs/cgroup/outer/cpu.max", "60000 20000\n")
    linux.write("sys/fs/cgroup/outer/memory.max", f"{6 * GIB}\n")
    linux.write("sys/fs/cgroup/outer/memory.current", f"{2 * GIB}\n")
    machine = read_machine(linux.root)
    assert machine.cpu_quota == 3.0
    assert (machine.total_memory_bytes, machine.available_memory_bytes) == (6 * GIB, 4 * GIB)


def test_limits_beside_the_own_group_do_not_count(linux: FakeLinux) -> None:
    linux.v2("/mine")
    linux.write("sys/fs/cgroup/mine/cpu.max", "max 100000\n")
    linux.write("sys/fs/cgroup/other/cpu.max", "100000 100000\n")
    linux.write("sys/fs/cgroup/other/memory.max", "1000000\n")
    machine = read_machine(linux.root)
    assert (machine.cpu_quota, machine.total_memory_bytes) == (None, 16 * GIB)


def test_v1_limits(linux: FakeLinux) -> None:
    linux.v1("/job")
    linux.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    linux.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    linux.write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "250000\n")
    linux.write("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    linux.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    linux.write("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{12 * GIB}\n")
    linux.write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{4 * GIB}\n")
    linux.write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{3 * GIB}\n")
    linux.write(
        "sys/fs/cgroup/memory/job/memory.stat",
        f"inactive_file 1\nactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB // 2}\n",
    )
    machine = read_machine(linux.root)
    assert machine.cpu_quota == 2.5
    assert machine.total_memory_bytes == 4 * GIB
    assert machine.available_memory_bytes == 2 * GIB + GIB // 2


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("group", "mount_root"), [("/docker/abc", "/docker/abc"), ("/../..", "/"), ("/gone", "/docker")]
)
def test_a_container_sees_only_its_own_part(linux: FakeLinux, version: str, group: str, mount_root: str) -> None:
    getattr(linux, version)(group, mount_root)
    linux.write("sys/fs/cgroup/cpu.max", "200000 100000\n")
    linux.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    linux.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert read_machine(linux.root).cpu_quota == 2.0


def test_file_cache_of_the_group_is_not_used_memory(linux: FakeLinux) -> None:
    linux.v2("/")
    linux.write("sys/fs/cgroup/memory.max", f"{8 * GIB}\n")
    linux.write("sys/fs/cgroup/memory.current", f"{7 * GIB}\n")
    linux.write(
        "sys/fs/cgroup/memory.stat",
        f"anon {GIB}\nfile {6 * GIB}\nshmem {GIB}\ninactive_file {3 * GIB}\nactive_file {2 * GIB}\n",
    )
    assert read_machine(linux.root).available_memory_bytes == 6 * GIB  # all but anon and shmem


def test_memory_high_is_a_limit_too(linux: FakeLinux) -> None:
    linux.v2("/")
    linux.write("sys/fs/cgroup/memory.max", "max\n")
    linux.write("sys/fs/cgroup/memory.high", f"{3 * GIB}\n")
    linux.write("sys/fs/cgroup/memory.current", f"{5 * GIB}\n")
    machine = read_machine(linux.root)
    assert (machine.total_memory_bytes, machine.available_memory_bytes) == (3 * GIB, 0)


def test_the_machine_may_have_less_than_the_limit(linux: FakeLinux) -> None:
    linux.v2("/")
    linux.write("sys/fs/cgroup/memory.max", f"{64 * GIB}\n")
    linux.write("sys/fs/cgroup/memory.current", "0\n")
    machine = read_machine(linux.root)
    assert (machine.total_memory_bytes, machine.available_memory_bytes) == (16 * GIB, 10 * GIB)


@pytest.mark.parametrize("text", ["", "rubbish", "-1 100000", "100000 0", "100000", "max"])
def test_unreadable_quotas_are_no_limit(linux: FakeLinux, text: str) -> None:
    linux.v2("/")
    linux.write("sys/fs/cgroup/cpu.max", text)
    assert read_machine(linux.root).cpu_quota is None


def test_int4_is_decoded_with_quantised_activations_where_int8_dot_products_are() -> None:
    settings = plan_openvino(XEON, "int4")
    assert settings == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": "4",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64",
    }


@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_other_weights_keep_their_activations(weights: str) -> None:
    assert plan_openvino(XEON, weights)["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"


def test_avx2_alone_gains_nothing_from_quantised_activations() -> None:
    machine = dataclasses.replace(XEON, instruction_sets=frozenset({"avx2", "fma"}))
    assert plan_openvino(machine, "int4")["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    assert plan_openvino(machine, "int4")["INFERENCE_PRECISION_HINT"] == "f32"


def test_an_unmeasured_processor_keeps_openvinos_own_choice() -> None:
    machine = dataclasses.replace(XEON, instruction_sets=frozenset({"asimd"}))
    assert plan_openvino(machine, "int4") == {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "4"}


def test_exact_quantises_nothing() -> None:
    settings = exact_openvino(XEON)
    assert settings["INFERENCE_PRECISION_HINT"] == settings["KV_CACHE_PRECISION"] == "f32"
    assert settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_openvino_knows_the_settings(weights: str) -> None:
    import openvino

    core = openvino.Core()
    for settings in (plan_openvino(XEON, weights), exact_openvino(XEON)):
        core.set_property("CPU", settings)
        assert core.get_property("CPU", "INFERENCE_NUM_THREADS") == 4


def test_this_machine() -> None:
    machine = read_machine()
    assert 1 <= plan_threads(machine) <= machine.physical_cores <= machine.logical_cpus
    assert 0 < machine.available_memory_bytes <= machine.total_memory_bytes
    assert 0 < available_memory_bytes() <= machine.total_memory_bytes
    assert machine.cpu


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set this way on Linux only")
def test_affinity_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        machine = read_machine()
    finally:
        os.sched_setaffinity(0, before)
    assert (machine.logical_cpus, plan_threads(machine)) == (1, 1)


def test_without_proc_the_operating_system_is_asked(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert machine.physical_cores >= 1
    assert 0 < machine.available_memory_bytes <= machine.total_memory_bytes
    assert machine.cpu_quota is None


def test_free_disk_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    free = free_disk_bytes(tmp_path / "not" / "yet")
    assert free == pytest.approx(free_disk_bytes(tmp_path), abs=GIB)
    assert free > 0
