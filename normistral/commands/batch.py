"""The command that answers about many documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normistral.commands.options import (
    Artifact,
    Choice,
    Debug,
    Device,
    EngineSettings,
    Exact,
    Grammar,
    JsonSchema,
    MaxNewTokens,
    MaxReasoningTokens,
    MinP,
    Regex,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    given,
)
from normistral.commands.structures import read_structure
from normistral.runtime.engines.settings import parse_settings
from normistral.serving.backends.settings import Batching


def batch(
    artifact: Artifact,
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
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    exact: Exact = False,
    device: Device = "CPU",
    engine_settings: EngineSettings = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    grammar: Grammar = None,
    max_reasoning_tokens: MaxReasoningTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what became of it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Answer about many documents, from a file or a folder.

    OUTPUT has a line of JSON for each, in their order: its answer, or the error that it met. Until all are done, the
    answers are kept beside it in OUTPUT.parts: after a kill or a crash, the same command goes on from there.
    """
    from normistral.cluster.batch import Workers
    from normistral.cluster.job import Engine
    from normistral.commands import console
    from normistral.commands.batching import answer_documents

    def decoded(text: str | None) -> str | None:
        return None if text is None else console.decode_argument(text)

    answer_documents(
        artifact,
        source,
        output,
        instruction=decoded(instruction),
        system=decoded(system),
        engine=Engine(device, exact, parse_settings(engine_settings), batching),
        workers=Workers(workers, threads, ray),
        force=force,
        options=given(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=None if stop is None else [console.decode_argument(text) for text in stop],
            structure=read_structure(json_schema, regex, choice, grammar),
            max_reasoning_tokens=max_reasoning_tokens,
        ),
        as_json=as_json,
    )
