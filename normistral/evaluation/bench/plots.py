"""Which charts a result has: the same data as SVG for HTML, and as bars of characters for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normistral.evaluation.bench.charts import Bar, Series, bar_chart, line_chart
from normistral.evaluation.bench.numbers import significant
from normistral.evaluation.bench.results import BenchResult

_BAR_CELLS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart.

    Attributes:
        across: what the x axis counts; empty where there is none.
        svg: as a picture.
        text: as lines of a fixed width.
        legend: labels in the order of their colours.
    """

    title: str
    across: str
    svg: str
    text: tuple[str, ...]
    legend: tuple[str, ...]


def draw_plots(result: BenchResult) -> list[Plot]:
    """Decode against context, prefill against length, share of the bandwidth."""
    if not result.measured:
        return []
    decode = [
        Series(one.label, tuple((point.context, point.tokens_per_s) for point in figures.decode))
        for one, figures in result.measured
    ]
    prefill = [
        Series(one.label, tuple((point.length, point.tokens_per_s) for point in figures.prefill))
        for one, figures in result.measured
    ]
    return [
        _lines("Writing: tokens a second", "tokens before it (context)", decode),
        _lines("Reading: tokens a second", "length of the prompt in tokens", prefill),
        *_shares(result),
    ]


def _lines(title: str, x_label: str, series: Sequence[Series]) -> Plot:
    highest = max(spread.median for one in series for _, spread in one.points)
    rows = [
        (f"{one.label}  {x:,}", spread.median / highest, significant(spread.median))
        for one in series
        for x, spread in one.points
    ]
    legend = tuple(one.label for one in series)
    return Plot(title, x_label, line_chart(title, x_label, series), character_bars(rows), legend)


def _shares(result: BenchResult) -> list[Plot]:
    """At the shortest context, where next to nothing but weights is read."""
    title = "Share of the memory's read bandwidth"
    bars = [
        Bar(
            one.label,
            figures.decode[0].share,
            f"{figures.decode[0].weight_gb_per_s:.1f} GB/s, {figures.decode[0].share:.0%}",
        )
        for one, figures in result.measured
        if figures.decode[0].share is not None
    ]
    if not bars:
        return []
    ceilings = ", ".join(f"{found.best.gb_per_s:.1f} GB/s" for found in result.bandwidth)
    chart = bar_chart(title, bars, 1.0, f"memory gives {ceilings}")
    highest = max(1.0, *(bar.value for bar in bars))
    rows = [(bar.label, bar.value / highest, bar.text) for bar in bars]
    return [Plot(title, "", chart, character_bars(rows), tuple(bar.label for bar in bars))]


def character_bars(rows: Sequence[tuple[str, float, str]]) -> tuple[str, ...]:
    """(label, part of the longest bar, text behind it) as lines, in eighths of a character."""
    width = max(len(label) for label, _, _ in rows)
    lines = []
    for label, part, text in rows:
        eighths = round(part * _BAR_CELLS * 8)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{label:<{width}}  {bar} {text}")
    return tuple(lines)
