"""A result as a report: an HTML page that needs nothing outside of it, or Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from normistral.evaluation.bench.advice import BenchSummary, summarise
from normistral.evaluation.bench.charts import COLOURS, Plot, draw_plots
from normistral.evaluation.bench.results import BenchResult
from normistral.evaluation.bench.tables import (
    ReportTable,
    configuration_table,
    describe_machine,
    describe_method,
    machine_table,
    speed_tables,
)

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
    return render_markdown(result) if suffix.lower() == ".md" else render_page(result)


def render_page(result: BenchResult) -> str:
    """The report as HTML."""
    return "\n".join(_page_lines(result)) + "\n"


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
    """A name with settings breaks before it breaks a word."""
    return re.sub("([@,=])", r"\1<wbr>", escape(label))


def render_markdown(result: BenchResult) -> str:
    """The report as Markdown."""
    return "\n".join(_markdown_lines(result)) + "\n"


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
    """Names are shown as they are written; what Markdown would read as a sign gets a backslash."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
