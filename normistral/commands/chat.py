"""Commands that write text: an answer, a conversation, a completion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from normistral.artifact.manifest import Manifest, read_manifest
from normistral.commands import console
from normistral.commands.offer import find_or_make
from normistral.commands.options import (
    Artifact,
    AsJson,
    Choice,
    Debug,
    Device,
    Draft,
    DraftTable,
    EngineSettings,
    Exact,
    Grammar,
    Greedy,
    HideReasoning,
    JsonSchema,
    MaxNewTokens,
    MaxReasoningTokens,
    MinP,
    Prompt,
    Regex,
    RepetitionPenalty,
    Seed,
    Session,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
    Verbose,
    complete_artifact,
    given,
)
from normistral.commands.structures import read_structure, require_whole
from normistral.errors import UsageError
from normistral.runtime.engines.settings import parse_settings
from normistral.runtime.options import GenerationConfig, require_applicable


def chat(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT]",
            help="Folder of an exported model, its name in the store, or a preset; default: the only one here.",
            autocompletion=complete_artifact,
        ),
    ] = None,
    prompt: Prompt = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    session: Session = None,
    overflow: Annotated[
        Literal["error", "drop-oldest"],
        typer.Option(help="When the conversation outgrows the context: stop, or leave out the oldest exchanges."),
    ] = "error",
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not remember messages for the next session.")
    ] = False,
    greedy: Greedy = False,
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
    draft: Draft = None,
    draft_table: DraftTable = None,
    hide_reasoning: HideReasoning = False,
    stats: Stats = False,
    as_json: AsJson = False,
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
    structure = read_structure(json_schema, regex, choice, grammar)
    options = _options(
        greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=_stop_texts(stop),
        max_reasoning_tokens=max_reasoning_tokens,
        draft=draft,
        structure=structure,
    )
    settings = parse_settings(engine_settings)
    message = None if prompt is None else _require_text(console.decode_argument(prompt))
    system = None if system is None else console.decode_argument(system)
    if session is not None:
        from normistral.commands.sessions import check_session

        check_session(session, system)
    folder = find_or_make(artifact)  # before the pipe is read: a wrong name is told first
    manifest = read_manifest(folder)
    _refuse_base_model(folder, manifest)
    _require_reasoning(folder, manifest, options, hide_reasoning=hide_reasoning, as_json=as_json)
    message = _read_pipe() if message is None else message
    if message is None and (as_json or stats):
        raise UsageError(
            "--json and --stats are for single answers", "add --prompt TEXT; in a conversation there is /stats"
        )
    if message is None and not console.is_terminal(sys.stdin):
        raise UsageError("stdin is closed: there is no message to read", "add --prompt TEXT, or pipe the message in")
    if message is None and not console.is_terminal(sys.stdout):
        raise UsageError("a conversation needs a terminal for its answers", "add --prompt TEXT for a single answer")
    from normistral.commands.answer import print_answer
    from normistral.runtime.kernels.advice import name_faster_way
    from normistral.runtime.loading import load

    if message is None:
        console.say(f"loading {folder.name} ...")
    with load(folder, device=device, exact=exact, settings=settings) as model:
        if faster := name_faster_way(model.capabilities.settings, settings):
            console.say(faster)
        if session is None:
            conversation = model.chat(system=system, overflow=overflow)
        else:
            from normistral.commands.sessions import open_conversation, save_session

            conversation = open_conversation(model, session, system, overflow)
        if message is not None:
            completion = print_answer(
                conversation.stream(message, **options),
                as_json=as_json,
                stats=stats,
                hide_reasoning=hide_reasoning,
                warn_if_cut_off=structure is None,
            )
            if session is not None:
                save_session(conversation, session)
            require_whole(completion, structure)
            return
        from normistral.commands.line_editor import LineEditor
        from normistral.commands.repl import Repl

        editor = LineEditor(keep_history=not no_history)
        Repl(model, conversation, options, editor, hide_reasoning=hide_reasoning, session=session).run()


def generate(
    artifact: Artifact,
    prompt: Prompt = None,
    greedy: Greedy = False,
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
    stop_at_newline: Annotated[
        bool,
        typer.Option("--stop-at-newline", help="End at the first line break; for prompts such as a translation's."),
    ] = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    grammar: Grammar = None,
    max_reasoning_tokens: MaxReasoningTokens = None,
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
    structure = read_structure(json_schema, regex, choice, grammar)
    options = _options(
        greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=_stop_texts(stop, at_newline=stop_at_newline),
        max_reasoning_tokens=max_reasoning_tokens,
        draft=draft,
        structure=structure,
    )
    settings = parse_settings(engine_settings)
    text = None if prompt is None else _require_text(console.decode_argument(prompt))
    folder = find_or_make(artifact)  # before the pipe is read: a wrong name is told first
    _require_reasoning(folder, read_manifest(folder), options, hide_reasoning=hide_reasoning, as_json=as_json)
    text = _read_pipe() if text is None else text
    if text is None:
        raise UsageError("there is no text to complete", "give --prompt TEXT, or pipe it in")
    from normistral.commands.answer import print_answer
    from normistral.runtime.loading import load

    with load(folder, device=device, exact=exact, settings=settings) as model:
        completion = print_answer(
            model.stream(text, **options),
            as_json=as_json,
            stats=stats,
            hide_reasoning=hide_reasoning,
            warn_if_cut_off=structure is None,
        )
        require_whole(completion, structure)


def _options(greedy: bool, **options: Any) -> dict[str, Any]:
    """Generation options that the user gave, checked before a model is loaded."""
    chosen = given(**options)
    if greedy:
        pointless = sorted({"temperature", "top_k", "top_p", "min_p"} & chosen.keys())
        if pointless:
            named = ", ".join("--" + name.replace("_", "-") for name in pointless)
            raise UsageError(f"--greedy leaves {named} nothing to do", "leave one of them out")
        chosen["temperature"] = 0.0
    GenerationConfig(**chosen)
    return chosen


def _stop_texts(stop: list[str] | None, *, at_newline: bool = False) -> tuple[str, ...] | None:
    """What --stop and --stop-at-newline ask for together; None where neither was given."""
    texts = [console.decode_argument(text) for text in stop or ()] + ["\n"] * at_newline
    return tuple(texts) if texts else None


def _read_pipe() -> str | None:
    """The text of the pipe; None when somebody sits at the terminal."""
    text = console.read_piped_prompt()
    return None if text is None else _require_text(text)


def _require_text(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty", "give --prompt TEXT, or pipe some text in")
    return text


def _refuse_base_model(folder: Path, manifest: Manifest) -> None:
    """Say so before the weights are loaded."""
    if manifest.template is None:
        raise UsageError(
            f"{folder.name} is a base model: it completes text and cannot chat",
            f"use: normistral generate {folder} --prompt TEXT",
        )


def _require_reasoning(
    folder: Path, manifest: Manifest, options: dict[str, Any], *, hide_reasoning: bool, as_json: bool
) -> None:
    """Refuse options for reasoning where there is none to be limited or hidden, before the weights are loaded."""
    require_applicable(GenerationConfig(**options), manifest, folder.name)
    if hide_reasoning and manifest.reasoning is None:
        raise UsageError(
            f"--hide-reasoning means nothing here: {folder.name} is no model that marks its reasoning", "leave it out"
        )
    if hide_reasoning and as_json:
        raise UsageError("--json shows the reasoning in a field of its own", "leave --hide-reasoning out")
