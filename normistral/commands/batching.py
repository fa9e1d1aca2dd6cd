"""The command `batch`: runs the job with a bar, and says how it went."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normistral.cluster.batch import Summary, Workers, run_batch
from normistral.cluster.job import Engine
from normistral.commands.console import print_json, say, warn
from normistral.commands.progress import show_progress


def answer_documents(
    artifact: str,
    source: Path,
    output: Path,
    *,
    instruction: str | None,
    system: str | None,
    engine: Engine,
    workers: Workers,
    force: bool,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Run a batch job; arguments and errors as `run_batch`."""
    with show_progress() as progress, redirect_stdout(sys.stderr):  # Ray prints that a worker died
        summary = run_batch(
            artifact,
            source,
            output,
            instruction=instruction,
            system=system,
            engine=engine,
            workers=workers,
            force=force,
            progress=progress,
            **options,
        )
    if as_json:
        print_json(asdict(summary))
    _tell(summary)


def _tell(summary: Summary) -> None:
    say(f"wrote {summary.output}: {summary.rows:,} documents, {summary.new_tokens:,} tokens, {summary.seconds:.1f} s")
    if summary.failed:
        warn(f'{summary.failed:,} documents have no answer: their lines have "error" in its place')
    if summary.cut_off:
        warn(f"{summary.cut_off:,} answers are cut off: --max-new-tokens or the context was reached")
