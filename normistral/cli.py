"""The command line: parse, call, print. What it prints, and how, is in `normistral.terminal`.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import normistral
from normistral import store
from normistral.errors import ArtifactError, NormistralError, UsageError
from normistral.export.recipe import FUSED_CONTEXT, GROUP_SIZES, PER_CHANNEL, Recipe
from normistral.manifest import Manifest, find_problems, read_manifest
from normistral.runtime.options import GenerationConfig, require_applicable
from normistral.terminal import console
from normistral.terminal.arguments import (
    DEFAULTS_NOTE,
    Artifact,
    AsJson,
    Device,
    EvalReference,
    EvalText,
    Exact,
    Greedy,
    HideReasoning,
    JsonFile,
    MaxNewTokens,
    MaxReasoningTokens,
    MaxTokens,
    MinP,
    Prompt,
    ReferenceCache,
    RepetitionPenalty,
    Seed,
    Stats,
    Stop,
    Stride,
    Temperature,
    TopK,
    TopP,
    Windows,
    WindowTokens,
)

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + the signal's number, as a shell reports it
_RECIPE = Recipe()
_logger = logging.getLogger("normistral")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        exit code: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted, 141 nobody reads what it writes.
    """
    console.use_utf8()
    _logger.setLevel(logging.WARNING)
    _logger.handlers[:] = [console.WarningLines()]
    try:
        return _invoke(sys.argv[1:] if arguments is None else arguments)
    except NormistralError as error:
        console.show_error(error)
        return _end_in_error(error.exit_code)
    except typer.TyperException as error:  # the parser's own: unknown options, missing arguments
        console.print_error(_uncapitalised(error.format_message()), _usage_hint(error))
        return _end_in_error(error.exit_code)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _end_in_broken_pipe()
        where = f"{error.filename}: " if error.filename else ""
        console.print_error(f"{where}{error.strerror or error}", "see that it is there and you may use it")
        return _end_in_error(1)
    except MemoryError:
        console.print_error("the memory is used up", "close other programs, or take smaller weights (int4)")
        return _end_in_error(1)
    except Exception as error:
        console.print_error(
            f"this is a bug in normistral: {type(error).__name__}: {error}",
            "run it again with --debug, and report what that prints",
        )
        return _end_in_error(1)


def _invoke(arguments: Sequence[str]) -> int:
    """Parse and call; errors are the caller's. (Typer's own `main` would print them in its way.)"""
    command = typer.main.get_command(app)
    code = 0
    try:
        with command.make_context("normistral", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as exit_:
        code = exit_.exit_code
    sys.stdout.flush()  # here, where a closed pipe is still noticed
    return code


def _remember_debug(on: bool) -> bool:
    if on:
        _logger.setLevel(logging.DEBUG)
    return on


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show what is logged, and a traceback after an error.", callback=_remember_debug, is_eager=True
    ),
]


def _print_version(on: bool) -> None:
    if on:
        typer.echo(f"normistral {normistral.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _normistral(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """NorMistral on ordinary processors: export a checkpoint to int4 or int8, OpenVINO or ONNX, and talk to it.

    An ARTIFACT is the folder of an exported model, or its name in the local store. Exit codes: 0 done, 1 it could not
    be done, 2 wrong usage.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# Exporting


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with each preset's quirks.")] = False,
    debug: Debug = False,
) -> None:
    """List the presets, and the artifacts in the local store."""
    from normistral.terminal.tables import models_document, models_lines

    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(models_document(folder, artifacts))
    else:
        console.print_lines(models_lines(folder, artifacts))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, a hub id, a folder, or a .gguf file.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Argument(metavar="[OUTPUT]", help="The folder to make; default: named after MODEL, in the local store."),
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the artifact: openvino or onnx.")] = _RECIPE.format,
    weights: Annotated[str, typer.Option(help="Weights: int4, int8 or fp16; for ONNX also fp32.")] = _RECIPE.weights,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How int4 and int8 are rounded: fast (to nearest), balanced (scales searched on our texts) or best "
            f"(GPTQ as well, and zero points at int4; takes longest). Default: {_RECIPE.recipe}."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help=f"Weights that share one scale, in int4 and ONNX's int8: {', '.join(map(str, GROUP_SIZES))}, or "
            f"{PER_CHANNEL} for one per channel (not in ONNX). Default: the largest that divides the model's widths."
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Round int4 and int8 to a grid around zero, without zero points. Default: symmetric, but for int4 "
            "with the recipe best.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the layers in int4; the most sensitive take --backup (not in ONNX). "
            f"Default: {_RECIPE.ratio:g}."
        ),
    ] = None,
    backup: Annotated[
        str | None,
        typer.Option(help=f"Layers that are not int4: int8_asym, int8_sym or fp. Default: {_RECIPE.backup}."),
    ] = None,
    output_layer_bits: Annotated[
        int | None,
        typer.Option(help=f"Output layer in 8 bits (--backup) or in 4. Default: {_RECIPE.output_layer_bits}."),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option(
            help="ONNX graph: fused (onnxruntime's own operators) or plain (the standard's, for fp16 and fp32). "
            "Default: fused for int4 and int8, else plain."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens that prompt and answer may take. Default: the checkpoint's, in a fused graph at most "
            f"{FUSED_CONTEXT}.",
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not prove that it is still the same model; the manifest says so.")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep an artifact that fails this proof as OUTPUT.failed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT if it is an artifact, once the new one is whole.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into an artifact. Prints the artifact's folder on stdout.

    Needs the extra "export": pip install "normistral[export]"; for ONNX also "onnx": "normistral[export,onnx]".
    """
    from normistral.export.pipeline import export_model
    from normistral.terminal.progress import show_progress

    options = _given(
        recipe=recipe,
        group_size=group_size,
        symmetric=symmetric,
        ratio=ratio,
        backup=backup,
        output_layer_bits=output_layer_bits,
        graph=graph,
        context_length=context,
    )
    folder = store.default_output(model, weights, format) if output is None else output
    with show_progress() as progress:
        export_model(
            model,
            folder,
            format,
            weights,
            force=force,
            revision=revision,
            verify=not no_verify,
            keep_failed=keep_failed,
            progress=progress,
            **options,
        )
    print(folder, flush=True)


# Talking


@app.command(epilog=DEFAULTS_NOTE)
def chat(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT]", help="Folder of an exported model, or its name in the store; default: the only one."
        ),
    ] = None,
    prompt: Prompt = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
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
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    max_reasoning_tokens: MaxReasoningTokens = None,
    hide_reasoning: HideReasoning = False,
    stats: Stats = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk to a chat model.

    In the conversation, /help lists its commands. With --prompt, or input from a pipe, it answers once: the answer
    alone on stdout, everything else on stderr, the reasoning of a thinking model included.
    """
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
    )
    message = _read_prompt(prompt)
    system = None if system is None else console.decode_argument(system)
    if message is None and (as_json or stats):
        raise UsageError(
            "--json and --stats are for single answers", "add --prompt TEXT; in a conversation there is /stats"
        )
    if message is None and not console.is_terminal(sys.stdout):
        raise UsageError("a conversation needs a terminal for its answers", "add --prompt TEXT for a single answer")
    from normistral.runtime.model import load
    from normistral.terminal.answers import print_answer

    folder = store.default_artifact() if artifact is None else store.resolve_artifact(artifact)
    manifest = read_manifest(folder)
    _refuse_base_model(folder, manifest)
    _require_reasoning(folder, manifest, options, hide_reasoning=hide_reasoning, as_json=as_json)
    if message is None:
        console.say(f"loading {folder.name} ...")
    with load(folder, device=device, exact=exact) as model:
        conversation = model.chat(system=system, overflow=overflow)
        if message is not None:
            print_answer(
                conversation.stream(message, **options), as_json=as_json, stats=stats, hide_reasoning=hide_reasoning
            )
            return
        from normistral.terminal.line_editor import LineEditor
        from normistral.terminal.repl import Repl

        editor = LineEditor(keep_history=not no_history)
        Repl(model, conversation, options, editor, hide_reasoning=hide_reasoning).run()


@app.command(epilog=DEFAULTS_NOTE)
def generate(
    artifact: Artifact,
    prompt: Prompt = None,
    greedy: Greedy = False,
    exact: Exact = False,
    device: Device = "CPU",
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
    max_reasoning_tokens: MaxReasoningTokens = None,
    hide_reasoning: HideReasoning = False,
    stats: Stats = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Complete a text; for base models.

    No chat template is used. The text itself is not repeated.
    """
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
    )
    text = _read_prompt(prompt)
    if text is None:
        raise UsageError("there is no text to complete", "give --prompt TEXT, or pipe it in")
    from normistral.runtime.model import load
    from normistral.terminal.answers import print_answer

    folder = store.resolve_artifact(artifact)
    _require_reasoning(folder, read_manifest(folder), options, hide_reasoning=hide_reasoning, as_json=as_json)
    with load(folder, device=device, exact=exact) as model:
        print_answer(model.stream(text, **options), as_json=as_json, stats=stats, hide_reasoning=hide_reasoning)


# Looking


@app.command()
def info(
    artifact: Artifact,
    check: Annotated[bool, typer.Option("--check", help="Hash every file again; exit code 1 if one differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact is made of."""
    from normistral.terminal.tables import info_document, info_lines

    folder = store.resolve_artifact(artifact)
    manifest = read_manifest(folder)
    problems = None
    if check:
        from normistral.terminal.progress import show_progress

        with show_progress() as progress, progress.stage("hashing", manifest.total_bytes, "bytes") as hashing:
            problems = list(find_problems(folder, manifest, thorough=True, on_bytes=hashing.advance))
    if as_json:
        console.print_json(info_document(folder, manifest, problems))
    else:
        console.print_lines(info_lines(folder, manifest))
        if problems is not None:
            console.print_lines(problems or [f"all {len(manifest.files)} files are as they were exported"])
    if problems:
        raise ArtifactError(
            f"{folder} has {len(problems)} damaged or missing files", "export the model again, or copy it again"
        )


@app.command("eval")
def evaluate(
    artifact: Artifact,
    text: EvalText,
    reference: EvalReference = None,
    windows: Windows = "sliding",
    window_tokens: WindowTokens = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    reference_cache: ReferenceCache = None,
    json_file: JsonFile = None,
    exact: Exact = False,
    device: Device = "CPU",
    debug: Debug = False,
) -> None:
    """Measure how well an artifact predicts a text.

    Perplexity; with --reference also KL divergence and top-1 agreement: how far it is from another artifact or from the
    checkpoint. A reference is computed once; a run that was stopped goes on where it was.
    """
    from normistral.terminal.evaluation import EvalOptions, run_eval

    options = EvalOptions(
        text=text,
        reference=reference,
        windows=windows,
        window_tokens=window_tokens,
        stride=stride,
        max_tokens=max_tokens,
        reference_cache=reference_cache,
        json=json_file,
        exact=exact,
        device=device,
    )
    run_eval(artifact, options)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show this machine, and what will be used and why."""
    from normistral.terminal.doctor import doctor_lines, examine

    report = examine()
    if as_json:
        console.print_json(report)
    else:
        console.print_lines(doctor_lines(report))


# Parts of the commands


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def _options(greedy: bool, **options: Any) -> dict[str, Any]:
    """Generation options that the user gave, checked before a model is loaded."""
    given = _given(**options)
    if greedy:
        pointless = sorted({"temperature", "top_k", "top_p", "min_p"} & given.keys())
        if pointless:
            named = ", ".join("--" + name.replace("_", "-") for name in pointless)
            raise UsageError(f"--greedy leaves {named} nothing to do", "leave one of them out")
        given["temperature"] = 0.0
    GenerationConfig(**given)
    return given


def _stop_texts(stop: list[str] | None, *, at_newline: bool = False) -> tuple[str, ...] | None:
    """What --stop and --stop-at-newline ask for together; None where neither was given."""
    texts = [console.decode_argument(text) for text in stop or ()] + ["\n"] * at_newline
    return tuple(texts) if texts else None


def _read_prompt(prompt: str | None) -> str | None:
    """The text of --prompt or of the pipe; None when somebody sits at the terminal."""
    text = console.read_piped_prompt() if prompt is None else console.decode_argument(prompt)
    if text is not None and not text.strip():
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


def _uncapitalised(message: str) -> str:
    return (message[:1].lower() + message[1:]).rstrip(".")


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = "normistral" if context is None else context.command_path
    return f"see {command} --help"


def _end_in_error(code: int) -> int:
    if _logger.isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    return code


def _end_in_broken_pipe() -> int:
    """Let nothing more be written, or the interpreter complains when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return _BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
