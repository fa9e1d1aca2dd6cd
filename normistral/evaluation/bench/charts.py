"""The charts of a result: SVG written by hand for HTML, bars of characters for Markdown.

Lines with ranges, and bars against a ceiling. Colours come from the page's CSS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from normistral.evaluation.bench.results import BenchResult, Spread
from normistral.evaluation.bench.tables import significant

COLOURS = 6  # classes s0 to s5, then again from the first
_WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 44
_LOG_FROM = 4.0  # an axis whose ends are further apart than this is logarithmic
_TICKS = 5
_BAR_CELLS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True)
class Series:
    """A line: (x, figure) in rising x."""

    label: str
    points: tuple[tuple[int, Spread], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """`value`, and the same in words; the label is the legend's."""

    label: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to pixels [start, end], by logarithm if `logarithmic`; one value alone stands in the middle."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        if self.high == self.low:
            return (self.start + self.end) / 2
        place = (value - self.low) / (self.high - self.low)
        if self.logarithmic:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + place * (self.end - self.start)


def choose_ticks(highest: float, most: int = _TICKS) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, up to the first that is not below `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest))
    steps = [factor * scale for scale in (power / 10, power) for factor in (1, 2, 5)] + [power * 10]
    step = next(step for step in steps if math.ceil(highest / step - 1e-9) <= most)
    count = max(1, math.ceil(highest / step - 1e-9))
    return [round(index * step, 12) for index in range(count + 1)]


def line_chart(title: str, x_label: str, series: Sequence[Series]) -> str:
    """Lines over a count of tokens; y begins at zero, because half as high shall be half as fast."""
    counts = sorted({x for one in series for x, _ in one.points})
    ticks = choose_ticks(max(spread.high for one in series for _, spread in one.points))
    across = Scale(
        counts[0], counts[-1], _LEFT + 12, _WIDTH - _RIGHT - 12, logarithmic=counts[-1] > _LOG_FROM * counts[0]
    )
    up = Scale(0.0, ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_horizontal_grid(ticks, up), *_count_labels(counts, across, x_label)]
    for index, one in enumerate(series):
        parts.append(_line(one, f"s{index % COLOURS}", across, up))
    return _svg(title, _WIDTH, _HEIGHT, parts)


def bar_chart(title: str, bars: Sequence[Bar], ceiling: float, ceiling_text: str) -> str:
    """Bars from zero, beside a line at the ceiling."""
    row, top = 44, 26
    height = top + row * len(bars) + 8
    across = Scale(0.0, max(ceiling, *(bar.value for bar in bars)), 4, _WIDTH - 8)
    x = across(ceiling)
    parts = []
    for index, bar in enumerate(bars):
        y = top + row * index
        parts.append(f'<text x="4" y="{y + 14}">{escape(bar.text)}</text>')
        parts.append(
            f'<rect class="track" x="4" y="{y + 20}" width="{x - 4:.1f}" height="14"/>'
            f'<rect class="bar s{index % COLOURS}" x="4" y="{y + 20}" width="{max(1.0, across(bar.value) - 4):.1f}" '
            f'height="14"><title>{escape(bar.label)}: {escape(bar.text)}</title></rect>'
        )
    parts.append(f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height - 6}"/>')
    parts.append(f'<text class="tick" x="{x:.1f}" y="12" text-anchor="end">{escape(ceiling_text)}</text>')
    return _svg(title, _WIDTH, height, parts)


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _horizontal_grid(ticks: Sequence[float], up: Scale) -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{significant_tick(tick)}</text>'
        for tick in ticks
    ]


def _count_labels(counts: Sequence[int], across: Scale, x_label: str) -> list[str]:
    base = _HEIGHT - _BOTTOM
    marks = [
        f'<line class="grid" x1="{across(count):.1f}" x2="{across(count):.1f}" y1="{base}" y2="{base + 5}"/>'
        f'<text class="tick" x="{across(count):.1f}" y="{base + 18}" text-anchor="middle">{count:,}</text>'
        for count in counts
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*marks, f'<text class="tick" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>']


def _line(series: Series, colour: str, across: Scale, up: Scale) -> str:
    places = [(across(x), spread) for x, spread in series.points]
    path = " ".join(f"{x:.1f},{up(spread.median):.1f}" for x, spread in places)
    marks = [
        f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{up(spread.low):.1f}" y2="{up(spread.high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{up(spread.median):.1f}" r="4"><title>{escape(series.label)}: '
        f"{significant(spread.median)} ({significant(spread.low)} to {significant(spread.high)})</title></circle>"
        for x, spread in places
    ]
    return f'<g class="{colour}"><polyline points="{path}"/>{"".join(marks)}</g>'


def significant_tick(value: float) -> str:
    """A tick is a round number: no digits that it has not."""
    return f"{value:,.6g}" if value < 1000 else f"{value:,.0f}"


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
        _line_plot("Writing: tokens a second", "tokens before it (context)", decode),
        _line_plot("Reading: tokens a second", "length of the prompt in tokens", prefill),
        *_shares(result),
    ]


def _line_plot(title: str, x_label: str, series: Sequence[Series]) -> Plot:
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
