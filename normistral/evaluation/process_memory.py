"""What memory this process takes: resident, and of that what the kernel cannot drop.

Linux tells it in /proc (proc_pid_status(5), proc_pid_smaps_rollup); elsewhere only the peak is known, if that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


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
