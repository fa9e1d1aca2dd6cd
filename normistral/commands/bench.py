"""`normistral bench`: measures speed, shows it, and writes reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.find_artifact import find
from normistral.commands.options import Debug, EngineArgs, JsonFile, OptionGroup
from normistral.commands.progress import show_progress
from normistral.commands.result_files import require_distinct, require_result_place, show_result, write_result
from normistral.errors import ContextLengthError, EngineError, UsageError

if TYPE_CHECKING:
    from normistral.evaluation.bench.configuration import Configuration
    from normistral.evaluation.bench.results import BenchResult
    from normistral.evaluation.bench.speed import SpeedPlan

_FAILED_HINT = "`normistral info ARTIFACT --check` and `normistral doctor` may say what is wrong"
_MOST_DIGITS = 9  # of a length in tokens; Python refuses to read thousands of them
_REPORTS = (".html", ".htm", ".md")


@dataclass(frozen=True, slots=True)
class BenchArgs(OptionGroup):
    """Options of a measurement and of its results."""

    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report with charts: FILE.html or FILE.md.")
    ] = None
    json_file: JsonFile = None
    quick: Annotated[bool, typer.Option("--quick", help="Shorter, fewer, less certain.")] = False
    prefill: Annotated[
        str | None,
        typer.Option(
            "--prefill", metavar="N,N", help="Lengths of the prompts. Default: 128,512,2048, as far as they fit."
        ),
    ] = None
    decode: Annotated[
        str | None,
        typer.Option("--decode", metavar="N,N", help="Tokens before those written. Default: 16,512,2048 likewise."),
    ] = None
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", help="Tokens to write at each. Default: 32.")
    ] = None
    repeats: Annotated[int | None, typer.Option(metavar="N", help="Measurements of each kind. Default: 5.")] = None


def bench(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help="Folders or names, each alone or with settings of its engine: ARTIFACT@KEY=VALUE,KEY=VALUE.",
            show_default=False,
        ),
    ],
    *,
    options: BenchArgs,
    engine: EngineArgs,
    debug: Debug = False,
) -> None:
    """Measure how fast artifacts are here, beside each other.

    Reading and writing at several lengths, time to first token, loading, memory, and which share of the machine's read
    bandwidth they reach. They take turns, so that a machine that gets slower does not decide.
    """
    console.require_stdout()
    import msgspec

    from normistral.evaluation.bench.configuration import read_configurations, split_settings
    from normistral.evaluation.bench.report import render_report
    from normistral.evaluation.bench.runner import run_benchmark

    _check_files(options)
    for artifact in artifacts:
        find(split_settings(artifact)[0])
    configurations = read_configurations(artifacts, engine.config)
    plan = choose_plan(options, configurations)
    with show_progress() as progress:
        result = run_benchmark(configurations, plan, progress)
    failed = [one for one in result.configurations if one.problem is not None]
    if not result.measured:
        raise EngineError(f"nothing could be measured: {failed[0].problem}", _FAILED_HINT)
    show_result(msgspec.to_builtins(result), result_lines(result), options.json_file)
    if options.report is not None:
        write_result(options.report, render_report(result, options.report.suffix))
    if failed:
        raise EngineError(
            f"{len(failed)} of {len(result.configurations)} could not be measured: {failed[0].problem}", _FAILED_HINT
        )


def choose_plan(options: BenchArgs, configurations: Sequence[Configuration]) -> SpeedPlan:
    """The defaults as far as they fit into the shortest context, and what the user asked for instead.

    Raises:
        UsageError: an option is no such number.
        ContextLengthError: what the user asked for does not fit.
    """
    from normistral.evaluation.bench.speed import QUICK, SpeedPlan, cut_to_context

    shortest = min(configurations, key=lambda one: one.manifest.context_length)
    context_length = shortest.manifest.context_length
    plan = QUICK if options.quick else SpeedPlan()
    if options.tokens is not None:
        plan = replace(plan, decode_tokens=options.tokens)
    if options.repeats is not None:
        plan = replace(plan, repeats=options.repeats)
    plan = cut_to_context(plan, context_length)
    if options.tokens is not None:
        plan = replace(plan, decode_tokens=options.tokens)
    if options.prefill is not None:
        plan = replace(plan, prefill_lengths=_parse_lengths("--prefill", options.prefill))
    if options.decode is not None:
        plan = replace(plan, decode_contexts=_parse_lengths("--decode", options.decode))
    if plan.most_tokens > context_length:
        raise ContextLengthError(
            f"that takes sequences of {plan.most_tokens:,} tokens; {shortest.label} has room for {context_length:,}",
            "take smaller numbers for --prefill, --decode or --tokens",
        )
    return plan


def result_lines(result: BenchResult) -> Iterator[str]:
    """Lines of the result for a terminal."""
    from normistral.evaluation.bench.tables import configuration_table, machine_table, speed_tables, summarise

    yield format_columns(machine_table(result).rows[1:])
    for table in speed_tables(result):
        heading, *rows = table.rows
        yield ""
        yield table.title
        yield format_columns([heading, *rows], indent=2)
    hashes = [(label, written) for label, _, _, written, _ in configuration_table(result).rows[1:] if written]
    if hashes:
        yield ""
        yield "Output's hash"
        yield format_columns(hashes, indent=2)
    yield ""
    summary = summarise(result)
    yield from summary.comparison
    yield from (f"{label}: {' '.join(sentences)}" for label, sentences in summary.configurations.items())
    yield from (f"Doubt: {sentence}" for sentence in summary.doubts)


def _check_files(options: BenchArgs) -> None:
    if options.report is not None and options.report.suffix.lower() not in _REPORTS:
        raise UsageError(f"--report {options.report}: unknown kind of report", "the name ends in .html or .md")
    named = {
        "--report": options.report,
        "--json": None if options.json_file in (None, "-") else Path(options.json_file or ""),
    }
    for option, path in named.items():
        if path is not None:
            require_result_place(path, option)
    require_distinct(named)


def _parse_lengths(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= _MOST_DIGITS for part in parts):
        raise UsageError(f"{option} {text}: not a list of whole numbers", f"such as: {option} 128,512")
    return tuple(sorted({int(part) for part in parts}))
