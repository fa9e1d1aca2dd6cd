"""Joules that the processor packages took, from the kernel's RAPL counters, where the machine shows them.

Source: Documentation/power/powercap/powercap.rst. The counters count the whole package, other programs included, and
begin again at zero after `max_energy_range_uj`. Since CVE-2020-8694 most systems let only root read them.
"""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = re.compile(r"^intel-rapl:\d+$")  # AMD's too; intel-rapl:0:0 is a part of intel-rapl:0


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
    packages = sorted(path for path in folder.iterdir() if _PACKAGE.match(path.name))
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
