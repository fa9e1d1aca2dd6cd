"""A result as a report: an HTML page that needs nothing outside of it, or Markdown.

Its charts are lines with ranges, and bars against a ceiling: SVG written by hand for HTML, bars of characters for
Markdown. Colours come from the page's CSS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from normistral.evaluation.bench.results import BenchResult, Spread
from normistral.evaluation.bench.tables import (
    BenchSummary,
    ReportTable,
    configuration_table,
    describe_machine,
    describe_method,
    machine_table,
    significant,
    speed_tables,
    summarise,
)

COLOURS = 6  # classes s0 to s5, then again from the first
# Okabe and Ito's colours, which colour-blind people can tell apart; lighter in the dark.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #fff; --card: #f6f7f9; --line: #dde1e7;
  --c0: #0068a8; --c1: #c45100; --c2: #008060; --c3: #b0528c; --c4: #a87700; --c5: #3f7fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --paper: #14181e; --card: #1d232b;
  --line: #323a45; --c0: #56b4e9; --c1: #f08a3c; --c2: #2fc79b; --c3: #dd8fbe; --c4: #e6b422; --c5: #8fb8e8; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 8px; }
.sub { color: var(--soft); margin: 4px 0 20px; }
.summary, figure, .part { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.summary { padding: 14px 20px; border-left: 5px solid var(--c0); }
.summary p { margin: 0 0 12px; } .summary h2 { margin: 0; }
.summary :last-child { margin-bottom: 0; } .summary .first { font-weight: 600; }
.doubts { margin-top: 12px; border-left-color: var(--c1); } .doubts ul { margin: 0; padding-left: 18px; }
.charts, .tables { display: grid; gap: 16px; margin: 16px 0; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .charts { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .tables { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; padding: 14px 16px; } figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
.part { padding: 14px 16px; min-width: 0; } .wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; overflow-wrap: normal; } tr:last-child td { border-bottom: 0; }
td:first-child { overflow-wrap: anywhere; min-width: 8em; } .n { text-align: right; } td.n { white-space: nowrap; }
.n small { display: block; color: var(--soft); }
th:last-child, td:last-child { padding-right: 0; } .wide td:last-child:not(.n) { min-width: 15em; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .875rem; margin-top: 6px; }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin-right: 6px; background: var(--c); }
.note { color: var(--soft); font-size: .875rem; } .note p { margin: 0 0 8px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); } svg .tick { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke: var(--c); stroke-width: 2; }
svg circle { fill: var(--c); } svg .range { stroke: var(--c); stroke-width: 6; opacity: .3; stroke-linecap: round; }
svg .bar { fill: var(--c); } svg .track { fill: var(--line); } svg .ceiling { stroke: var(--ink); stroke-width: 2; }
@media print { .summary, figure, .part { break-inside: avoid; } }
"""
_SERIES = "".join(f".s{index} {{ --c: var(--c{index}); }}\n" for index in range(COLOURS))


def render_report(result: BenchResult, suffix: str) -> str:
    """The whole report, as Markdown for ".md" and HTML for anything else."""
    lines = _markdown_lines(result) if suffix.lower() == ".md" else _page_lines(result)
    return "\n".join(lines) + "\n"


def _page_lines(result: BenchResult) -> Iterator[str]:
    title = f"Speed on {describe_machine(result)}"
    names = ", ".join(one.label for one in result.configurations)
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{_STYLE}{_SERIES}</style>\n</head>\n<body>\n<main>"
    yield f'<h1>{escape(title)}</h1>\n<p class="sub">{_breakable(names)} · {escape(result.created[:10])}</p>'
    yield from _summary(summarise(result))
    yield '<div class="charts">'
    yield from map(_figure, draw_plots(result))
    yield '</div>\n<div class="tables">'
    yield from map(_table_html, speed_tables(result))
    yield _table_html(machine_table(result), "part wide")
    yield _table_html(configuration_table(result), "part wide")
    yield '</div>\n<section class="note"><h2>How it was measured</h2>'
    yield from (f"<p>{escape(paragraph)}</p>" for paragraph in describe_method(result))
    yield "</section>\n</main>\n</body>\n</html>"


def _summary(summary: BenchSummary) -> Iterator[str]:
    yield '<section class="summary">'
    if summary.comparison:
        yield f'<p class="first">{escape(" ".join(summary.comparison))}</p>'
    for label, sentences in summary.configurations.items():
        yield f"<h2>{_breakable(label)}</h2><p>{escape(' '.join(sentences))}</p>"
    yield "</section>"
    if summary.doubts:
        yield '<section class="summary doubts"><h2>Doubts</h2><ul>'
        yield from (f"<li>{escape(sentence)}</li>" for sentence in summary.doubts)
        yield "</ul></section>"


def _figure(plot: Plot) -> str:
    legend = "".join(
        f'<span class="s{index % COLOURS}">{_breakable(label)}</span>' for index, label in enumerate(plot.legend)
    )
    return f'<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}<div class="legend">{legend}</div></figure>'


def _table_html(table: ReportTable, kind: str = "part") -> str:
    heading, *rows = table.rows
    lines = [f'<section class="{kind}"><h2>{escape(table.title)}</h2><div class="scroll"><table>']
    if any(heading):
        lines.append(f"<tr>{''.join(_cells(table, heading, 'th'))}</tr>")
    lines += [f"<tr>{''.join(_cells(table, row, 'td'))}</tr>" for row in rows]
    return "\n".join([*lines, "</table></div></section>"])


def _cells(table: ReportTable, row: tuple[str, ...], tag: str) -> Iterator[str]:
    for index, cell in enumerate(row):
        if index < table.text_columns:
            yield f"<{tag}>{_breakable(cell)}</{tag}>"
            continue
        median, _, spread = cell.partition(" (")
        below = f"<small>{escape(spread.removesuffix(')'))}</small>" if spread else ""
        yield f'<{tag} class="n">{escape(median)}{below}</{tag}>'


def _breakable(label: str) -> str:
    """A label as HTML that may wrap behind @, comma and =."""
    return re.sub("([@,=])", r"\1<wbr>", escape(label))


def _markdown_lines(result: BenchResult) -> Iterator[str]:
    yield f"# Speed on {_escape_markdown(describe_machine(result))}"
    yield ""
    summary = summarise(result)
    for sentence in summary.comparison:
        yield f"- {_escape_markdown(sentence)}"
    for label, sentences in summary.configurations.items():
        yield f"- **{_escape_markdown(label)}**: {_escape_markdown(' '.join(sentences))}"
    for sentence in summary.doubts:
        yield f"- *Doubt:* {_escape_markdown(sentence)}"
    for plot in draw_plots(result):
        yield from ("", f"## {plot.title}", plot.across and f"\nBy {plot.across}.", "", "```", *plot.text, "```")
    for table in [*speed_tables(result), machine_table(result), configuration_table(result)]:
        yield from ("", f"## {table.title}", "", *_markdown_table(table))
    yield from ("", "## How it was measured", "")
    for paragraph in describe_method(result):
        yield from (_escape_markdown(paragraph), "")


def _markdown_table(table: ReportTable) -> Iterator[str]:
    heading, *rows = table.rows
    yield _markdown_row(heading)
    yield _markdown_row(["---" if index < table.text_columns else "---:" for index in range(len(heading))])
    for row in rows:
        yield _markdown_row([_escape_markdown(cell) for cell in row])


def _markdown_row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape_markdown(text: str) -> str:
    """A backslash in front of every character that has a meaning in Markdown."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text


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


Bar = tuple[str, float, str]
"""Label, value, and the value in words."""


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


def choose_ticks(highest: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, up to the first that is not below `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest))
    steps = [factor * scale for scale in (power / 10, power) for factor in (1, 2, 5)] + [power * 10]
    step = next(step for step in steps if math.ceil(highest / step - 1e-9) <= _TICKS)
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


def bar_chart(title: str, bars: Sequence[Bar], ceiling_text: str) -> str:
    """Bars from zero, beside a line at the ceiling, which is 1."""
    row, top = 44, 26
    height = top + row * len(bars) + 8
    across = Scale(0.0, max(1.0, *(value for _, value, _ in bars)), 4, _WIDTH - 8)
    x = across(1.0)
    parts = []
    for index, (label, value, text) in enumerate(bars):
        y = top + row * index
        parts.append(f'<text x="4" y="{y + 14}">{escape(text)}</text>')
        parts.append(
            f'<rect class="track" x="4" y="{y + 20}" width="{x - 4:.1f}" height="14"/>'
            f'<rect class="bar s{index % COLOURS}" x="4" y="{y + 20}" width="{max(1.0, across(value) - 4):.1f}" '
            f'height="14"><title>{escape(label)}: {escape(text)}</title></rect>'
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
        (f"{one.label}  {x:,}", spread.median, significant(spread.median)) for one in series for x, spread in one.points
    ]
    legend = tuple(one.label for one in series)
    return Plot(title, x_label, line_chart(title, x_label, series), character_bars(rows, highest), legend)


def _shares(result: BenchResult) -> list[Plot]:
    """At the shortest context, where next to nothing but weights is read."""
    title = "Share of the memory's read bandwidth"
    bars: list[Bar] = [
        (one.label, first.share, f"{first.weight_gb_per_s:.1f} GB/s, {first.share:.0%}")
        for one, figures in result.measured
        if (first := figures.decode[0]).share is not None
    ]
    if not bars:
        return []
    ceilings = ", ".join(f"{found.best.gb_per_s:.1f} GB/s" for found in result.bandwidth)
    chart = bar_chart(title, bars, f"memory gives {ceilings}")
    highest = max(1.0, *(value for _, value, _ in bars))
    return [Plot(title, "", chart, character_bars(bars, highest), tuple(label for label, _, _ in bars))]


def character_bars(bars: Sequence[Bar], longest: float) -> tuple[str, ...]:
    """Bars as lines, in eighths of a character; one of the value `longest` has the full width."""
    width = max(len(label) for label, _, _ in bars)
    lines = []
    for label, value, text in bars:
        eighths = round(value / longest * _BAR_CELLS * 8)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{label:<{width}}  {bar} {text}")
    return tuple(lines)
