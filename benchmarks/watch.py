"""Run a command and record what it took: time, memory over its process tree, temporary disk.

    python benchmarks/watch.py [--disk FOLDER] [--limit-gib N] [--kill-after S] [--json FILE] -- COMMAND [ARGUMENT ...]

Memory is RssAnon + RssShmem + VmSwap, summed over the command and all its descendants, read 20 times a second: what
the machine must really provide. Mapped files (RssFile) are given apart, since the kernel can drop them; "resident" is
the peak of both together. The command is killed when the machine's available memory falls below a floor, so that
nothing else is. With --limit-gib it runs in a control group of that size, page cache included; --kill-after ends it
with SIGKILL after so many seconds, as a power cut would.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from memory_group import MemoryGroup, memory_group

INTERVAL_S = 0.05
FLOOR_BYTES = 2**30
PRIVATE = ("RssAnon", "RssShmem", "VmSwap")


def read_memory(pid: int) -> dict[str, int]:
    """Bytes of each kind of memory of one process; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Rss", "VmSwap"))}
    return {kind: int(found.get(kind, 0)) * 1024 for kind in (*PRIVATE, "RssFile")}


def descendants(pid: int) -> list[int]:
    """The process and everything below it."""
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*/children"):
            try:
                queue += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def folder_bytes(folder: Path) -> int:
    """Bytes on disk below a folder; files that vanish while it looks count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it does not mind a folder that vanishes
        for name in names:
            try:
                total += os.lstat(f"{parent}/{name}").st_blocks * 512
            except OSError:
                continue
    return total


def watch(
    command: list[str], disk: Path | None, kill_after_s: float | None = None, group: MemoryGroup | None = None
) -> dict[str, object]:
    """Run the command to its end, within a control group if one is given; peaks in GiB, time in seconds."""
    disk_before = folder_bytes(disk) if disk else 0
    peak = {"anonymous": 0, "mapped": 0, "resident": 0, "disk": 0}
    killed = False
    started = time.monotonic()
    process = subprocess.Popen(command, preexec_fn=group.join if group else None)
    samples = 0
    while process.poll() is None:
        memory = [read_memory(pid) for pid in descendants(process.pid)]
        anonymous = sum(one[kind] for one in memory for kind in PRIVATE)
        mapped = sum(one["RssFile"] for one in memory)
        for kind, now in (("anonymous", anonymous), ("mapped", mapped), ("resident", anonymous + mapped)):
            peak[kind] = max(peak[kind], now)
        if disk and samples % 20 == 0:
            peak["disk"] = max(peak["disk"], folder_bytes(disk) - disk_before)
        if available_bytes() < FLOOR_BYTES:
            process.kill()
            killed = True
        if kill_after_s is not None and time.monotonic() - started > kill_after_s:
            for pid in descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        samples += 1
        time.sleep(INTERVAL_S)
    seconds = time.monotonic() - started
    return {
        "command": command,
        "exit_code": process.returncode,
        "killed_for_memory": killed,
        "seconds": round(seconds, 1),
        "samples_per_s": round(samples / seconds, 1),
        "peak_anonymous_gib": round(peak["anonymous"] / 2**30, 2),
        "peak_mapped_gib": round(peak["mapped"] / 2**30, 2),
        "peak_resident_gib": round(peak["resident"] / 2**30, 2),
        "peak_disk_gib": round(peak["disk"] / 2**30, 2) if disk else None,
        "final_disk_gib": round((folder_bytes(disk) - disk_before) / 2**30, 2) if disk else None,
        "group": group.figures() if group else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, help="measure how much this folder grows")
    parser.add_argument("--limit-gib", type=float, help="run in a control group of this size")
    parser.add_argument("--kill-after", type=float, metavar="S", help="SIGKILL after so many seconds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    with ExitStack() as stack:
        group = None
        if arguments.limit_gib is not None:
            group = stack.enter_context(memory_group(int(arguments.limit_gib * 2**30)))
        figures = watch(command, arguments.disk, arguments.kill_after, group)
    line = json.dumps(figures)
    print(line, file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return int(figures["exit_code"] or 0)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
