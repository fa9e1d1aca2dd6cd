"""`normistral chat` and `normistral generate`: a conversation at the terminal, a single answer, a completed text.

Also `draft-table`, which was removed: it is hidden, and answers with an error that says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
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
    AnswerArgs,
    ArtifactName,
    Debug,
    EngineArgs,
    Greedy,
    OverflowPolicy,
    Prompt,
    SamplingArgs,
    StructureArgs,
    Verbose,
    complete_artifact,
)
from normistral.errors import UsageError
from normistral.runtime.options import refuse_draft_table
from normistral.runtime.overflow import OVERFLOW


def chat(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT]",
            help="Folder of an exported model, its name in the store, a preset, or OWNER/NAME of a published one. "
            "Default: the only one here.",
            autocompletion=complete_artifact,
        ),
    ] = None,
    prompt: Prompt = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Go on with the conversation that this file holds, if it is there, and save it there."
        ),
    ] = None,
    overflow: OverflowPolicy = OVERFLOW,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not remember messages for the next session.")
    ] = False,
    *,
    greedy: Greedy = False,
    sampling: SamplingArgs,
    engine: EngineArgs,
    structure: StructureArgs,
    shown: AnswerArgs,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Talk to a chat model.

    In the conversation, /help lists its commands. With --prompt, or input from a pipe, it answers once: the answer
    alone on stdout, everything else on stderr, the reasoning of a thinking model included.

    A session holds what was said and what the model made of it, so that nothing is computed again. It is saved when the
    conversation or the single answer ends, and by /save without a file.
    """
    console.require_stdout()
    form = read_structure(structure)
    options = generation_options(sampling, greedy=greedy, draft=shown.draft, structure=form)
    settings = engine.settings
    message = None if prompt is None else require_text(console.decode_argument(prompt))
    system = None if system is None else console.decode_argument(system)
    if session is not None:
        from normistral.commands.saved_chats import check_session

        check_session(session, system)
    folder = find_or_make(artifact)  # before the pipe is read: a wrong name is told first
    manifest = read_manifest(folder)
    if manifest.template is None:
        raise UsageError(
            f"{folder.name} is a base model: it completes text and cannot chat",
            f"use: normistral generate {folder} --prompt TEXT",
        )
    require_reasoning(folder, manifest, options, shown)
    message = read_pipe() if message is None else message
    if message is None and (shown.as_json or shown.stats):
        raise UsageError(
            "--json and --stats are for single answers", "add --prompt TEXT; in a conversation there is /stats"
        )
    if message is None and not console.is_terminal(sys.stdin):
        raise UsageError("stdin is closed: there is no message to read", "add --prompt TEXT, or pipe the message in")
    if message is None and not console.is_terminal(sys.stdout):
        raise UsageError("a conversation needs a terminal for its answers", "add --prompt TEXT for a single answer")
    from normistral.runtime.kernels.library import name_faster_way
    from normistral.runtime.loading import load

    if message is None:
        console.say(f"loading {folder.name} ...")
    with load(folder, device=engine.device, exact=engine.exact, settings=settings) as model:
        if faster := name_faster_way(model.capabilities.settings, settings):
            console.say(faster)
        if session is None:
            conversation = model.chat(system=system, overflow=overflow)
        else:
            from normistral.commands.saved_chats import open_conversation, save_session

            conversation = open_conversation(model, session, system, overflow)
        if message is not None:
            chunks = conversation.stream(message, **options)
            if conversation.left_out is not None:
                console.warn(conversation.left_out.describe())
            completion = print_answer(chunks, shown, left_out=conversation.left_out, warn_if_cut_off=form is None)
            if session is not None:
                save_session(conversation, session)
            require_whole(completion, form)
            return
        from normistral.commands.line_editor import LineEditor
        from normistral.commands.repl import Repl

        editor = LineEditor(keep_history=not no_history)
        Repl(model, conversation, options, editor, hide_reasoning=shown.hide_reasoning, session=session).run()


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
    shown: AnswerArgs,
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
        draft=shown.draft,
        structure=form,
        further_stops=("\n",) if stop_at_newline else (),
    )
    settings = engine.settings
    text = None if prompt is None else require_text(console.decode_argument(prompt))
    folder = find_or_make(artifact)  # before the pipe is read: a wrong name is told first
    require_reasoning(folder, read_manifest(folder), options, shown)
    text = read_pipe() if text is None else text
    if text is None:
        raise UsageError("there is no text to complete", "give --prompt TEXT, or pipe it in")
    from normistral.runtime.loading import load

    with load(folder, device=engine.device, exact=engine.exact, settings=settings) as model:
        completion = print_answer(model.stream(text, **options), shown, warn_if_cut_off=form is None)
        require_whole(completion, form)


def draft_table(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    debug: Debug = False,
) -> None:
    """Removed."""
    refuse_draft_table("draft-table")
