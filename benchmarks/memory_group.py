"""A control group that limits memory, page cache included: what a container or a small machine would do.

For cgroup v1 (the group is made below the caller's own, which needs root). On a machine with systemd and cgroup v2,
`systemd-run --user --scope -p MemoryMax=2G -p MemorySwapMax=0 COMMAND` does the same without this file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup/memory")
REMOVE_WITHIN_S = 5.0


class MemoryGroup:
    """A group that processes join by themselves, before they start their program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def join(self) -> None:
        """Move the calling process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def figures(self) -> dict[str, int | float]:
        """Peak of memory and page cache together, how often the limit was met, and how many it killed."""
        control = dict(line.split() for line in (self.folder / "memory.oom_control").read_text().splitlines())
        return {
            "limit_gib": round(self._number("memory.limit_in_bytes") / 2**30, 2),
            "peak_with_page_cache_gib": round(self._number("memory.max_usage_in_bytes") / 2**30, 2),
            "times_at_limit": self._number("memory.failcnt"),
            "killed_by_limit": int(control["oom_kill"]),
        }

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A fresh group with a limit, removed at the end; its processes must have ended by then."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if line.split(":")[1] == "memory"), None)
    if own is None:
        sys.exit("error: no memory controller of cgroup v1 here\nhint: use systemd-run (benchmarks/memory_group.py)")
    folder = MOUNT / own.lstrip("/") / f"normistral-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        deadline = time.monotonic() + REMOVE_WITHIN_S
        while True:
            try:
                folder.rmdir()
                break
            except OSError:  # busy while a killed process gives its memory back
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
