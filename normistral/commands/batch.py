"""`normistral batch`: answers about many documents."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from normistral.commands.answer import read_structure
from normistral.commands.console import decode_argument, print_json, say, warn
from normistral.commands.find_artifact import find
from normistral.commands.options import (
    ArtifactName,
    Debug,
    EngineArgs,
    OverflowPolicy,
    SamplingArgs,
    StructureArgs,
    given,
)
from normistral.commands.progress import show_progress
from normistral.runtime.overflow import OVERFLOW
from normistral.server.backends.base import Batching


def batch(
    artifact: ArtifactName,
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="A JSONL file, or a folder with .txt and .md files.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The JSONL file to make, a line a document.", show_default=False)
    ],
    instruction: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help='What to ask, with {fields} of the document: "Summarise: {text}". Default: its own "prompt" or '
            '"messages".',
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="N models side by side under Ray. Default: one, in this process, without Ray."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of each worker. Default: the processors that there are, divided."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster that is running. Default: one on this machine, for now."),
    ] = None,
    batching: Annotated[
        Batching,
        typer.Option(help="auto computes many answers together where the engine can; off writes one after the other."),
    ] = "auto",
    overflow: OverflowPolicy = OVERFLOW,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    *,
    engine: EngineArgs,
    sampling: SamplingArgs,
    structure: StructureArgs,
    as_json: Annotated[bool, typer.Option("--json", help="Print what became of it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Answer about many documents, from a file or a folder.

    OUTPUT has a line of JSON for each, in their order: its answer, or the error that it met. Until all are done, the
    answers are kept beside it in OUTPUT.parts: after a kill or a crash, the same command goes on from there.
    """
    from normistral.batch.job import WorkerEngine, Workers
    from normistral.batch.run import run_batch

    def decoded(text: str | None) -> str | None:
        return None if text is None else decode_argument(text)

    named = WorkerEngine(engine.device, engine.exact, engine.settings, batching)
    options = sampling.options() | given(structure=read_structure(structure))
    folder = find(artifact)
    with show_progress() as progress, redirect_stdout(sys.stderr):  # Ray prints that a worker died
        summary = run_batch(
            str(folder),
            source,
            output,
            instruction=decoded(instruction),
            system=decoded(system),
            engine=named,
            workers=Workers(workers, threads, ray),
            overflow=overflow,
            force=force,
            progress=progress,
            **options,
        )
    if as_json:
        print_json(asdict(summary))
    say(f"wrote {summary.output}: {summary.rows:,} documents, {summary.new_tokens:,} tokens, {summary.seconds:.1f} s")
    if summary.failed:
        warn(f'{summary.failed:,} documents have no answer: their lines have "error" in its place')
    if summary.cut_off:
        warn(f"{summary.cut_off:,} answers are cut off: --max-new-tokens or the context was reached")
