"""Hardware for inference: cores, memory and instruction sets, within the limits of a container.

`read_machine` reads files; the `plan_...` functions are pure. Linux is read from
/proc and /sys below a given root, so that any machine can be tested from a folder; elsewhere the operating system is
asked for what it tells without extra packages. It knows nothing of models, and imports no inference engine.

Sources: cgroup v2 `cpu.max`, `memory.max`, `memory.stat` in the kernel's admin-guide/cgroup-v2; v1 `cpu.cfs_quota_us`
in scheduler/sched-bwc and admin-guide/cgroup-v1/memory; `Cpus_allowed_list` (affinity and cpusets together) in
proc_pid_status(5); mountinfo in proc_pid_mountinfo(5).
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Instruction sets that decide how fast a matrix product runs, by their names in /proc/cpuinfo (x86, then Arm).
_INSTRUCTION_SETS = frozenset(
    {"sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"}
    | {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"}
    | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}
)
INT8_DOT_PRODUCT = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})

# What oneDNN, and so OpenVINO, may use of them under ONEDNN_MAX_CPU_ISA (oneDNN's "CPU Dispatcher Control"). Asked for
# RUNTIME_REQUIREMENTS, a compiled model tells the instruction set that it then has.
_SSE41 = frozenset({"sse4_2"})
_AVX = _SSE41 | {"avx"}
_AVX2 = _AVX | {"avx2", "fma", "f16c"}
_AVX2_VNNI = _AVX2 | {"avx_vnni"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw"}
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AVX512_BF16 = _AVX512_VNNI | {"avx512_bf16"}
_AVX512_FP16 = _AVX512_BF16 | {"avx512_fp16", "avx_vnni"}
_AMX = _AVX512_FP16 | {"amx_tile", "amx_int8", "amx_bf16"}
_ONEDNN_LIMITS = {
    "SSE41": _SSE41,
    "AVX": _AVX,
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2_VNNI,
    "AVX2_VNNI_2": _AVX2_VNNI,
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _AVX512_VNNI,
    "AVX512_CORE_BF16": _AVX512_BF16,
    "AVX512_CORE_FP16": _AVX512_FP16,
    "AVX10_1_512": _AVX512_FP16,
    "AVX512_CORE_AMX": _AMX,
    "AVX10_1_512_AMX": _AMX,
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Resources that this process may use.

    Attributes:
        cpu: the processor's own name.
        physical_cores: cores in the affinity mask; two hyper-threads of one core count once.
        logical_cpus: CPUs in the affinity mask.
        cpu_quota: CPU seconds per second that the tightest control group allows; None is no limit.
        instruction_sets: those of `/proc/cpuinfo` that matter for matrix products, less what ONEDNN_MAX_CPU_ISA
            forbids; empty where they are not known.
        total_memory_bytes: memory of the machine or of the tightest control group, whichever is less.
        available_memory_bytes: what can still be had of it without swapping.
    """

    cpu: str
    physical_cores: int
    logical_cpus: int
    cpu_quota: float | None
    instruction_sets: frozenset[str]
    total_memory_bytes: int
    available_memory_bytes: int


def plan_threads(machine: Machine) -> int:
    """How many threads to compute with: one per physical core, within the quota.

    A second hyper-thread shares the vector units of its core and only adds waiting. A quota is CPU time, not cores:
    n threads under a quota q < n all stand still for the share 1 - q/n of every period (100 ms by default). So a
    thread more than the whole part of q adds q - floor(q) cores of work and brings such a pause into every period.
    At half a core or more that is worth having (1.5 gives 2 threads: 1.5 cores of work instead of 1); below, the
    pause is paid for next to nothing (1.1 gives 1, 4.2 gives 4).
    """
    if machine.cpu_quota is None:
        return machine.physical_cores
    return max(1, min(machine.physical_cores, math.floor(machine.cpu_quota + 0.5)))


def plan_openvino(machine: Machine, weights: str) -> dict[str, str]:
    """OpenVINO CPU settings for decoding one sequence of a model with these weights ("int4", "int8", "fp16").

    Measured, not guessed: docs/decisions.md has the figures. Other machines and other work may have better settings.
    """
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(plan_threads(machine))}
    for chosen, _ in _choose_openvino(machine, weights):
        settings |= chosen
    return settings


def explain_openvino(machine: Machine, weights: str) -> list[str]:
    """Reasons of `plan_openvino`, a line for each choice."""
    return [reason for _, reason in _choose_openvino(machine, weights)]


def _choose_openvino(machine: Machine, weights: str) -> Iterator[tuple[dict[str, str], str]]:
    if "avx2" not in machine.instruction_sets:
        yield {}, "OpenVINO's own choice of precision: nothing was measured on processors like this one"
        return
    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # through AMX bf16 prefills faster
    yield precision, "f32: bf16 decodes a third slower where it was measured, and a chat mostly decodes"
    group = "0"  # of activations that are quantised to int8, as int8 dot products with int4 weights take them
    if weights != "int4":
        reason = f"no dynamic quantisation: it would double the small loss of {weights} weights"
    elif not machine.instruction_sets & INT8_DOT_PRODUCT:
        reason = "no dynamic quantisation: without int8 dot products it gains no speed"
    else:
        group, reason = "64", "dynamic quantisation: a fifth faster with int8 dot products, at 1 to 6 % of int4's loss"
    yield {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}, reason


def exact_openvino(machine: Machine) -> dict[str, str]:
    """OpenVINO CPU settings of the reference arithmetic: float32 activations and KV cache, nothing quantised."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(plan_threads(machine)),
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }


def plan_onnxruntime(machine: Machine) -> dict[str, str]:
    """onnxruntime settings for decoding one sequence: fields of its SessionOptions, and "session." entries of its
    configuration (onnxruntime_session_options_config_keys.h).
    """
    return {
        "intra_op_num_threads": str(plan_threads(machine)),
        "inter_op_num_threads": "1",  # a decoder has no branches worth a thread
        # Between two operators, threads wait faster by spinning than by sleeping; under a quota they burn it.
        "session.intra_op.allow_spinning": "1" if machine.cpu_quota is None else "0",
        # Weights stay for good: outside the arena they do not make it grow in steps of twice the size.
        "session.use_device_allocator_for_initializers": "1",
    }


def read_machine(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Machine:
    """Look at this machine, or at the copy of a Linux machine's /proc and /sys below `root`."""
    if not (root / "proc/cpuinfo").is_file():
        return _read_other_system()
    allowed = _allowed_cpus(root)
    total, available = _read_memory(root)
    name, instruction_sets = _read_cpuinfo(root)
    return Machine(
        cpu=name,
        physical_cores=_count_cores(root, allowed),
        logical_cpus=len(allowed),
        cpu_quota=_cpu_quota(root),
        instruction_sets=limit_instruction_sets(instruction_sets, environ),
        total_memory_bytes=total,
        available_memory_bytes=available,
    )


def limit_instruction_sets(found: frozenset[str], environ: Mapping[str, str]) -> frozenset[str]:
    """Instruction sets of a processor within the limit that the environment sets.

    OpenVINO's matrix kernels obey it (ONEDNN_MAX_CPU_ISA, or by its old name DNNL_MAX_CPU_ISA); onnxruntime's have no
    such limit, and no plan for it asks.
    """
    return found & _ONEDNN_LIMITS.get(instruction_set_limit(environ), found)


def instruction_set_limit(environ: Mapping[str, str]) -> str:
    """The limit's name; "" where there is none. oneDNN too takes an unknown name for none."""
    limit = (environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    return limit if limit in _ONEDNN_LIMITS else ""


def available_memory_bytes() -> int:
    """Memory this process can still have without swapping, container limits included."""
    return read_machine().available_memory_bytes


def free_disk_bytes(path: Path) -> int:
    """Free bytes for this user on the disk that holds `path`, or would hold it: the part that exists decides.

    Raises:
        OSError: the disk cannot be asked.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


# CPUs


def _read_cpuinfo(root: Path) -> tuple[str, frozenset[str]]:
    name, flags = "", ""
    for line in _read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features") and not flags:
            flags = value
    return name or platform.machine(), frozenset(flags.split()) & _INSTRUCTION_SETS


def _allowed_cpus(root: Path) -> list[int]:
    """The affinity mask; it holds the cpusets of all control groups too."""
    for line in _read_text(root / "proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == "Cpus_allowed_list" and (cpus := _parse_cpu_list(value)):
            return cpus
    described = [line for line in _read_text(root / "proc/cpuinfo").splitlines() if line.startswith("processor")]
    return list(range(max(1, len(described))))


def _parse_cpu_list(text: str) -> list[int]:
    """`0-2,5` is [0, 1, 2, 5]."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _count_cores(root: Path, allowed: list[int]) -> int:
    """Distinct cores among the allowed CPUs; a CPU whose siblings are not told counts as a core."""
    cores = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read_text(topology / "thread_siblings_list") or _read_text(topology / "core_cpus_list")
        cores.add(siblings.strip() or str(cpu))
    return len(cores)


def _cpu_quota(root: Path) -> float | None:
    """The least quota from this process's control groups up to the top, in CPUs."""
    quotas = []
    for folder in _control_groups(root, "cpu"):
        quota, period = _read_text(folder / "cpu.cfs_quota_us"), _read_text(folder / "cpu.cfs_period_us")  # v1
        if not quota:
            quota, _, period = _read_text(folder / "cpu.max").partition(" ")  # v2: "150000 100000" or "max 100000"
        if (microseconds := _parse_count(quota)) and (of := _parse_count(period)):
            quotas.append(microseconds / of)
    return min(quotas, default=None)


# Memory


def _read_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes, the control groups' limits included."""
    meminfo = _read_counts(root / "proc/meminfo")
    total = meminfo.get("MemTotal", 0) * 1024
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", 0)) * 1024
    for folder in _control_groups(root, "memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it the kernel slows the process down until it shrinks
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _parse_count(_read_text(folder / limit_name))
            if limit is None:
                continue
            used = _parse_count(_read_text(folder / usage_name)) or 0
            used = max(0, used - _reclaimable_bytes(folder))
            total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _reclaimable_bytes(folder: Path) -> int:
    """Page cache charged to the group: the kernel drops it before it refuses memory. tmpfs is not in these lists."""
    counts = _read_counts(folder / "memory.stat")
    # v1 counts a group without its children, and with them under total_; its usage includes them.
    return sum(counts.get(f"total_{name}", counts.get(name, 0)) for name in ("inactive_file", "active_file"))


# Control groups


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups that may limit `controller`: v1 and v2, each from its own group to the top."""
    mounts = list(_control_group_mounts(root))
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for kind, options, mount_root, mount_point in mounts:
            if (kind == "cgroup2") != (controllers == "") or (controllers and controller not in options):
                continue
            top = root / mount_point.lstrip("/")
            folder = top / _below(group, mount_root)
            yield folder
            while folder != top:
                folder = folder.parent
                yield folder


def _control_group_mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """(cgroup or cgroup2, mount options, root within the hierarchy, mount point) of each mounted hierarchy."""
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) >= 5 and len(tail) >= 3 and tail[0] in ("cgroup", "cgroup2"):
            yield tail[0], tail[2].split(","), fields[3], fields[4]


def _below(group: str, mount_root: str) -> PurePosixPath:
    """The group's place below the mount point; a container often sees only its own part of the hierarchy."""
    path = PurePosixPath(group)
    if ".." not in path.parts and path.is_relative_to(mount_root):
        return path.relative_to(mount_root)
    return PurePosixPath()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not there, or not for us: the caller takes it as "says nothing"


def _read_counts(path: Path) -> dict[str, int]:
    """Lines such as `MemTotal:   123 kB` or `inactive_file 123`."""
    counts = {}
    for line in _read_text(path).splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) >= 2 and fields[1].isdigit():
            counts[fields[0]] = int(fields[1])
    return counts


def _parse_count(text: str) -> int | None:
    """A whole number above 0; `max` and -1 mean no limit, and so does v1's 2^63 rounded down to a page."""
    text = text.strip()
    return int(text) if text.isdigit() and 0 < int(text) < 2**62 else None


# macOS, Windows


def _read_other_system() -> Machine:
    """The machine as far as the standard library tells; instruction sets stay unknown."""
    logical = os.cpu_count() or 1
    if sys.platform == "win32":
        total, available = _windows_memory()
        cores = logical
    elif sys.platform == "darwin":
        total = _sysctl("hw.memsize")
        pages = _sysctl("vm.page_free_count") + _sysctl("vm.page_pageable_external_count")  # free, and file cache
        available = pages * _sysctl("hw.pagesize") or total
        cores = _sysctl("hw.physicalcpu") or logical
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available, cores = total, logical
    return Machine(
        cpu=platform.processor() or platform.machine(),
        physical_cores=cores,
        logical_cpus=logical,
        cpu_quota=None,
        instruction_sets=frozenset(),
        total_memory_bytes=total,
        available_memory_bytes=min(available, total),
    )


def _windows_memory() -> tuple[int, int]:
    """Total and available bytes from GlobalMemoryStatusEx."""
    import ctypes

    class MemoryStatusEx(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "available", "total_page", "free_page", "total_virtual", "free_virtual", "extended")
        ]

    status = MemoryStatusEx(length=ctypes.sizeof(MemoryStatusEx))
    ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total), int(status.available)


def _sysctl(name: str) -> int:
    """A number from macOS's sysctlbyname(3); 0 when it has none of this name."""
    import ctypes

    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value
