"""One answer on stdout and all else on stderr; and the words for an answer that is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from normistral.commands.console import AnswerWriter, print_json, say, warn
from normistral.commands.info import completion_document, describe_timings
from normistral.runtime.chunks import Chunk, Completion, FinishReason

WHY_IT_ENDED: dict[FinishReason, str] = {
    "stop": "the model stopped",
    "length": "--max-new-tokens was reached",
    "context": "the context is full",
    "cancelled": "it was stopped",
}


def print_answer(
    chunks: Iterable[Chunk], *, as_json: bool, stats: bool, hide_reasoning: bool, warn_if_cut_off: bool = True
) -> Completion:
    """Print an answer while it comes (as JSON: when it is whole), its reasoning and what it is not on stderr."""
    writer, gathered = AnswerWriter(None if hide_reasoning else sys.stderr), []
    try:
        for chunk in chunks:
            gathered.append(chunk)
            if not as_json:
                writer.write(chunk.text, chunk.reasoning)
    finally:
        writer.end()
    completion = Completion.from_chunks(gathered)
    if as_json:
        print_json(completion_document(completion))
    if not warn_if_cut_off:
        pass
    elif completion.reasoning_open and not completion.text:
        warn(describe_missing_answer(completion.finish_reason))
    elif completion.finish_reason == "length":
        warn("the answer is cut off: --max-new-tokens was reached")
    elif completion.finish_reason == "context":
        warn("the answer is cut off: the context is full")
    if stats:
        say(describe_timings(completion.timings))
    return completion


def describe_missing_answer(finish_reason: FinishReason) -> str:
    """One line on an answer that ended before its reasoning did."""
    return (
        f"there is no answer: the reasoning did not end ({WHY_IT_ENDED[finish_reason]}); "
        "--max-reasoning-tokens N ends it after N tokens"
    )
