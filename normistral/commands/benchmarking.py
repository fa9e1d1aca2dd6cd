"""The command that measures speed."""

from __future__ import annotations

from normistral.commands import console
from normistral.commands.options import (
    Artifacts,
    Debug,
    DecodeContexts,
    DecodeTokens,
    Device,
    EngineSettings,
    Exact,
    JsonFile,
    PrefillLengths,
    Quick,
    Repeats,
    Report,
)
from normistral.runtime.engines.settings import parse_settings


def bench(
    artifacts: Artifacts,
    report: Report = None,
    json_file: JsonFile = None,
    quick: Quick = False,
    prefill: PrefillLengths = None,
    decode: DecodeContexts = None,
    tokens: DecodeTokens = None,
    repeats: Repeats = None,
    exact: Exact = False,
    device: Device = "CPU",
    engine_settings: EngineSettings = None,
    debug: Debug = False,
) -> None:
    """Measure how fast artifacts are here, beside each other.

    Reading and writing at several lengths, time to first token, loading, memory, and which share of the machine's read
    bandwidth they reach. They take turns, so that a machine that gets slower does not decide.
    """
    console.require_stdout()
    from normistral.commands.bench import BenchOptions, run_bench

    options = BenchOptions(
        report=report,
        json=json_file,
        quick=quick,
        prefill=prefill,
        decode=decode,
        tokens=tokens,
        repeats=repeats,
        exact=exact,
        device=device,
        settings=parse_settings(engine_settings),
    )
    run_bench(artifacts, options)
