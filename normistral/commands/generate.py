"""`normistral generate`: completes a text."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.artifact.manifest import read_manifest
from normistral.commands import console
from normistral.commands.answer import (
    generation_options,
    print_answer,
    read_pipe,
    read_structure,
    require_reasoning,
    require_text,
    require_whole,
)
from normistral.commands.find_artifact import find_or_make
from normistral.commands.options import (
    ArtifactName,
    AsJson,
    Debug,
    Draft,
    DraftTable,
    EngineArgs,
    Greedy,
    HideReasoning,
    Prompt,
    SamplingArgs,
    Stats,
    StructureArgs,
    Verbose,
)
from normistral.errors import UsageError


def generate(
    artifact: ArtifactName,
    prompt: Prompt = None,
    *,
    greedy: Greedy = False,
    sampling: SamplingArgs,
    stop_at_newline: Annotated[
        bool,
        typer.Option("--stop-at-newline", help="End at the first line break; for prompts such as a translation's."),
    ] = False,
    engine: EngineArgs,
    structure: StructureArgs,
    draft: Draft = None,
    draft_table: DraftTable = None,
    hide_reasoning: HideReasoning = False,
    stats: Stats = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Complete a text; for base models, which do not chat.

    No chat template is used. The text itself is not repeated.
    """
    console.require_stdout()
    form = read_structure(structure)
    options = generation_options(
        sampling,
        greedy=greedy,
        draft=draft,
        structure=form,
        further_stops=("\n",) if stop_at_newline else (),
    )
    settings = engine.settings
    text = None if prompt is None else require_text(console.decode_argument(prompt))
    folder = find_or_make(artifact)  # before the pipe is read: a wrong name is told first
    require_reasoning(folder, read_manifest(folder), options, hide_reasoning=hide_reasoning, as_json=as_json)
    text = read_pipe() if text is None else text
    if text is None:
        raise UsageError("there is no text to complete", "give --prompt TEXT, or pipe it in")
    from normistral.runtime.loading import load

    with load(folder, device=engine.device, exact=engine.exact, settings=settings) as model:
        completion = print_answer(
            model.stream(text, **options),
            as_json=as_json,
            stats=stats,
            hide_reasoning=hide_reasoning,
            warn_if_cut_off=form is None,
        )
        require_whole(completion, form)
