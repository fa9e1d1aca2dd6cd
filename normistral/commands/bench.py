"""The command `bench`: plans, measures with a bar, and shows and writes what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from normistral.commands.console import format_columns, print_json, print_lines
from normistral.commands.progress import show_progress
from normistral.commands.result_files import require_result_place, write_result
from normistral.errors import ContextLengthError, EngineError, UsageError
from normistral.evaluation.bench.advice import summarise
from normistral.evaluation.bench.configuration import Configuration, read_configurations
from normistral.evaluation.bench.markdown import render_markdown
from normistral.evaluation.bench.page import render_page
from normistral.evaluation.bench.results import BenchResult
from normistral.evaluation.bench.rounds import Watcher, run_benchmark
from normistral.evaluation.bench.tables import configuration_table, machine_table, speed_tables
from normistral.evaluation.speed import QUICK, SpeedPlan, cut_to_context

_FAILED_HINT = "`normistral info ARTIFACT --check` and `normistral doctor` may say what is wrong"
_REPORTS = {".html": render_page, ".htm": render_page, ".md": render_markdown}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What the user asked for; names as on the command line."""

    report: Path | None
    json: str | None
    quick: bool
    prefill: str | None
    decode: str | None
    tokens: int | None
    repeats: int | None
    exact: bool
    device: str
    settings: dict[str, str]


def run_bench(artifacts: Sequence[str], options: BenchOptions) -> None:
    """Measure, print, and write the files that were asked for.

    Raises:
        NormistralError: whatever may go wrong; options are checked first. Where one of several configurations failed,
            the results of the others are shown and written before; where all failed, nothing is.
    """
    _check_files(options)
    configurations = read_configurations(artifacts, options.settings, options.device, exact=options.exact)
    plan = choose_plan(options, configurations)
    with show_progress() as progress, progress.stage("measuring", unit="measurements") as stage:
        watcher = Watcher(stage.set_total, stage.advance, progress.note)
        result = run_benchmark(configurations, plan, watcher)
    failed = [one for one in result.configurations if one.problem is not None]
    if not result.measured:
        raise EngineError(f"nothing could be measured: {failed[0].problem}", _FAILED_HINT)
    document = msgspec.to_builtins(result)
    if options.json == "-":
        print_json(document)
    else:
        print_lines(result_lines(result))
    if options.json not in (None, "-"):
        write_result(Path(options.json or ""), json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    if options.report is not None:
        write_result(options.report, _REPORTS[options.report.suffix.lower()](result))
    if failed:
        raise EngineError(
            f"{len(failed)} of {len(result.configurations)} could not be measured: {failed[0].problem}", _FAILED_HINT
        )


def choose_plan(options: BenchOptions, configurations: Sequence[Configuration]) -> SpeedPlan:
    """The defaults as far as they fit into the shortest context, and what the user asked for instead.

    Raises:
        UsageError: an option is no such number.
        ContextLengthError: what the user asked for does not fit.
    """
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
    """The result for people at a terminal."""
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


def _check_files(options: BenchOptions) -> None:
    if options.report is not None and options.report.suffix.lower() not in _REPORTS:
        raise UsageError(f"--report {options.report}: unknown kind of report", "the name ends in .html or .md")
    named = {"--report": options.report, "--json": None if options.json in (None, "-") else Path(options.json or "")}
    for option, path in named.items():
        if path is not None:
            require_result_place(path, option)
    if options.report is not None and named["--json"] == options.report:
        raise UsageError(f"--json and --report both name {options.report}", "take two names")


def _parse_lengths(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"{option} {text}: not a list of whole numbers", f"such as: {option} 128,512")
    return tuple(sorted({int(part) for part in parts}))
