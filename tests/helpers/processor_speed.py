"""Bounds on processor time that hold on machines of any speed."""

from __future__ import annotations

import time

_REFERENCE_S = 0.05  # what `_work` takes where the bounds were set: a core of 3 GHz, CPython 3.11


def within(spent_s: float, bound_s: float) -> bool:
    """Whether processor time is within a bound; on a machine that is slow at this moment the bound grows as much."""
    return spent_s < bound_s or spent_s < bound_s * _slowness()


def _slowness() -> float:
    times = []
    for _ in range(5):
        began = time.process_time()
        _work()
        times.append(time.process_time() - began)
    return max(1.0, sorted(times)[2] / _REFERENCE_S)


def _work() -> None:
    found: dict[str, list[int]] = {}
    for number in range(200_000):
        found.setdefault(str(number % 1000), []).append(number)
