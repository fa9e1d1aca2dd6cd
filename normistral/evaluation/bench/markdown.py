"""A result as Markdown: summary, charts of characters, tables."""

from __future__ import annotations

from collections.abc import Iterator

from normistral.evaluation.bench.advice import summarise
from normistral.evaluation.bench.plots import draw_plots
from normistral.evaluation.bench.results import BenchResult
from normistral.evaluation.bench.tables import (
    Table,
    configuration_table,
    describe_machine,
    describe_method,
    machine_table,
    speed_tables,
)


def render_markdown(result: BenchResult) -> str:
    """The whole report."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: BenchResult) -> Iterator[str]:
    yield f"# Speed on {_escape(describe_machine(result))}"
    yield ""
    summary = summarise(result)
    for sentence in summary.comparison:
        yield f"- {_escape(sentence)}"
    for label, sentences in summary.configurations.items():
        yield f"- **{_escape(label)}**: {_escape(' '.join(sentences))}"
    for sentence in summary.doubts:
        yield f"- *Doubt:* {_escape(sentence)}"
    for plot in draw_plots(result):
        yield from ("", f"## {plot.title}", plot.across and f"\nBy {plot.across}.", "", "```", *plot.text, "```")
    for table in [*speed_tables(result), machine_table(result), configuration_table(result)]:
        yield from ("", f"## {table.title}", "", *_table(table))
    yield from ("", "## How it was measured", "")
    for paragraph in describe_method(result):
        yield from (_escape(paragraph), "")


def _table(table: Table) -> Iterator[str]:
    heading, *rows = table.rows
    yield _row(heading)
    yield _row(["---" if index < table.text_columns else "---:" for index in range(len(heading))])
    for row in rows:
        yield _row([_escape(cell) for cell in row])


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Names are shown as they are written; what Markdown would read as a sign gets a backslash."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
