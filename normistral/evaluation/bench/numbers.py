"""Figures as people read them."""

from __future__ import annotations

from normistral.evaluation.bench.results import Spread


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 1,230."""
    if value == 0:
        return "0"
    shown = float(f"{value:.3g}")
    if abs(shown) >= 100:
        return f"{shown:,.0f}"
    text = f"{shown:.12f}".rstrip("0")
    digits = 3 - len(text.lstrip("-0.").replace(".", ""))
    return (text + "0" * digits if digits > 0 else text).removesuffix(".")


def with_range(spread: Spread | None) -> str:
    """`12.3 (11.9 to 12.8)`; without the range where there was only one measurement."""
    if spread is None:
        return "–"
    if spread.n == 1:
        return significant(spread.median)
    return f"{significant(spread.median)} ({significant(spread.low)} to {significant(spread.high)})"


def seconds(value: float) -> str:
    """`3.2 ms`, `0.35 s`, `2.1 s`, `12 s`, `3 min`: as precise as a person cares."""
    if value < 0.00995:
        return f"{value * 1000:.1f} ms"
    if value >= 120:
        return f"{value / 60:.0f} min"
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f} s"


def bytes_(count: int | None) -> str:
    """In 10^9 or 10^6 bytes; a dash where it is not known."""
    if count is None:
        return "–"
    return f"{significant(count / 1e9)} GB" if count >= 1e9 else f"{significant(count / 1e6)} MB"
