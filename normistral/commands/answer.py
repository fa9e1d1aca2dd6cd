"""One answer of `chat`, `generate` and `batch`: its options checked, its prompt read, and itself printed.

The answer goes to stdout, all else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import Manifest
from normistral.commands.console import (
    AnswerWriter,
    decode_argument,
    print_json,
    say,
    warn,
)
from normistral.commands.options import AnswerArgs, SamplingArgs, StructureArgs, given
from normistral.commands.translate import translate
from normistral.errors import NormistralError, UsageError
from normistral.runtime.chunks import Chunk, Completion, FinishReason, Timings
from normistral.runtime.options import DraftMode, GenerationConfig, require_applicable
from normistral.runtime.overflow import LeftOut
from normistral.runtime.structured.structure import MOST_BYTES, Structure
from normistral.text_input import decode_text, read_text_file

WHY_IT_ENDED: dict[FinishReason, str] = {
    "stop": "the model stopped",
    "length": "--max-new-tokens was reached",
    "context": "the context is full",
    "cancelled": "it was stopped",
}

_WITHOUT_GREEDY = {"temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold"}


def generation_options(
    sampling: SamplingArgs,
    *,
    greedy: bool,
    draft: DraftMode | None,
    structure: Structure | None,
    further_stops: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Keyword arguments of a generation, checked before a model is loaded.

    Raises:
        UsageError: a value out of range, or an option that --greedy leaves without effect.
    """
    options = sampling.options(further_stops) | given(draft=draft, structure=structure)
    if greedy:
        pointless = sorted(options.keys() & _WITHOUT_GREEDY)
        if pointless:
            named = ", ".join("--" + name.replace("_", "-") for name in pointless)
            raise UsageError(f"--greedy leaves {named} nothing to do", "leave one of them out")
        options["temperature"] = 0.0
    GenerationConfig(**options)
    return options


def read_structure(args: StructureArgs) -> Structure | None:
    """The structure that the options ask for.

    Raises:
        UsageError: several are given, a file cannot be read, or no model could follow it.
    """
    values = given(json_schema=args.json_schema, regex=args.regex, choice=args.choice or None, grammar=args.grammar)
    if not values:
        return None
    names = ["--" + name.replace("_", "-") for name in values]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} cannot be given together", "leave one of them out")
    ((kind, value),) = values.items()
    if isinstance(value, Path):
        text: str | list[str] = read_text_file(value, "give a file that is there", names[0], MOST_BYTES)
    else:
        text = decode_argument(value) if isinstance(value, str) else [decode_argument(one) for one in value]
    structure: Structure = getattr(Structure, kind)(text)
    from normistral.runtime.structured.compile import check_structure

    check_structure(structure)
    return structure


def read_pipe() -> str | None:
    """The text piped into stdin, without the line end of `echo`; None if stdin is a terminal or closed.

    Raises:
        UsageError: it is empty, or not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    text = decode_text(sys.stdin.buffer.read(), "the input")
    return require_text(text.removesuffix("\n").removesuffix("\r"))


def require_text(text: str) -> str:
    """The text, unless it is empty.

    Raises:
        UsageError: it is.
    """
    if not text.strip():
        raise UsageError("the prompt is empty", "give --prompt TEXT, or pipe some text in")
    return text


def require_reasoning(folder: Path, manifest: Manifest, options: dict[str, Any], shown: AnswerArgs) -> None:
    """Refuse options for reasoning where there is none to be limited or hidden, before the weights are loaded."""
    require_applicable(GenerationConfig(**options), manifest, folder.name)
    if shown.hide_reasoning and manifest.reasoning is None:
        raise UsageError(
            f"--hide-reasoning means nothing here: {folder.name} is no model that marks its reasoning", "leave it out"
        )
    if shown.hide_reasoning and shown.as_json:
        raise UsageError("--json shows the reasoning in a field of its own", "leave --hide-reasoning out")


def print_answer(
    chunks: Iterable[Chunk], shown: AnswerArgs, *, warn_if_cut_off: bool = True, left_out: LeftOut | None = None
) -> Completion:
    """Print an answer while it comes (as JSON: when it is whole), its reasoning and what it is not on stderr.

    Args:
        left_out: of the conversation that is answered.
    """
    writer, gathered = AnswerWriter(None if shown.hide_reasoning else sys.stderr), []
    try:
        for chunk in chunks:
            gathered.append(chunk)
            if not shown.as_json:
                writer.write(chunk.text, chunk.reasoning)
    finally:
        writer.end()
    completion = Completion.from_chunks(gathered)
    if shown.as_json:
        print_json(completion_document(completion, left_out))
    if not warn_if_cut_off:
        pass
    elif completion.reasoning_open and not completion.text:
        warn(describe_missing_answer(completion.finish_reason))
    elif completion.finish_reason == "length":
        warn("the answer is cut off: --max-new-tokens was reached")
    elif completion.finish_reason == "context":
        warn("the answer is cut off: the context is full")
    if shown.stats:
        say(describe_timings(completion.timings))
    return completion


def require_whole(completion: Completion, structure: Structure | None) -> None:
    """Have a structured answer that was cut off end in an error: no script may read half of it.

    Raises:
        NormistralError: it was.
    """
    if structure is not None and completion.finish_reason != "stop":
        raise NormistralError(
            f"the answer is cut off before it was whole: {WHY_IT_ENDED[completion.finish_reason]}",
            "raise --max-new-tokens, or bound lengths and numbers of items in what you ask for",
        )


def describe_missing_answer(finish_reason: FinishReason) -> str:
    """One line on an answer that ended before its reasoning did."""
    return (
        f"there is no answer: the reasoning did not end ({WHY_IT_ENDED[finish_reason]}); "
        "--max-reasoning-tokens N ends it after N tokens"
    )


def completion_document(completion: Completion, left_out: LeftOut | None = None) -> dict[str, Any]:
    """A whole answer for programs; times in seconds."""
    return {
        "text": completion.text,
        "reasoning": completion.reasoning,
        "reasoning_open": completion.reasoning_open,
        "finish_reason": completion.finish_reason,
        "token_ids": list(completion.token_ids),
        "left_out": None if left_out is None else left_out.document(),
        "timings": asdict(completion.timings) | {"tokens_per_s": completion.timings.tokens_per_s},
    }


def describe_timings(timings: Timings) -> str:
    """One line on a generation."""
    line = translate(
        f"{timings.new_tokens} tokens at {timings.tokens_per_s:.1f} tokens/s, the first after {timings.ttft_s:.2f} s; "
        f"prompt of {timings.prompt_tokens} tokens, {timings.cached_tokens} of them known from before"
    )
    if not timings.drafted_tokens:
        return line
    return f"{line}; " + translate(f"{timings.accepted_tokens} of {timings.drafted_tokens} guessed tokens were right")
