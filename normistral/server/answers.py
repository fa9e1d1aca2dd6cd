"""Answers of a conversation as all routes read them: text, reasoning and calls of tools told apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from normistral.errors import UsageError
from normistral.runtime.chunks import Chunk, ToolCall
from normistral.runtime.overflow import OVERFLOW, LeftOut, Overflow
from normistral.runtime.tools import CallDelta, Tool, ToolCallParser, read_tools, tool_structure
from normistral.server.generation import SequenceOutput
from normistral.server.model_handler import ModelHandler
from normistral.server.options import read_options, read_reasoning_budget
from normistral.server.responses import finish_reason
from normistral.server.schemas import ChatCompletionRequest


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """News of one answer.

    Attributes:
        text: of the answer.
        calls: pieces of calls.
        chunks: of which it is certain now that they belong to the text.
        finish_reason: in OpenAI's words, of the last part.
    """

    choice: int
    chunk: Chunk
    text: str
    calls: Sequence[CallDelta]
    chunks: Sequence[Chunk]
    finish_reason: str | None


@dataclass(slots=True)
class ChatAnswer:
    """One answer, as far as it has come."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, part: AnswerPart) -> None:
        """Take a part."""
        self.text += part.text
        self.reasoning += part.chunk.reasoning
        self.chunks += part.chunks
        for delta in part.calls:
            if delta.name is not None and delta.id is not None:
                self.calls.append(ToolCall(delta.id, delta.name, ""))
            call = self.calls[delta.index]
            self.calls[delta.index] = ToolCall(call.id, call.name, call.arguments + delta.arguments)
        self.finish_reason = part.finish_reason


async def read_parts(
    outputs: AsyncIterator[SequenceOutput], parsers: Sequence[ToolCallParser]
) -> AsyncIterator[AnswerPart]:
    """Parts of all answers of a request; a parser for each."""
    undecided: list[list[Chunk]] = [[] for _ in parsers]
    async for index, chunk in outputs:
        parser, waiting = parsers[index], undecided[index]
        text, calls = parser.push(chunk.token_id, chunk.text)
        waiting.append(chunk)
        reason = finish_reason(chunk.finish_reason)
        if reason is not None:
            text += parser.flush()
            if parser.calls and reason == "stop":
                reason = "tool_calls"
        certain = tuple(waiting) if parser.is_text or (reason and not parser.calls) else ()
        if certain or parser.calls:
            waiting.clear()
        yield AnswerPart(index, chunk, text, calls, certain, reason)


def prepare_chat(
    handler: ModelHandler, body: ChatCompletionRequest, overflow: Overflow = OVERFLOW
) -> tuple[list[tuple[list[int], Any]], LeftOut | None]:
    """Prompt and options of a conversation, and what the policy left out of it.

    Raises:
        NormistralError: the request cannot be answered.
    """
    options, budget = read_options(body), read_reasoning_budget(body)
    if handler.manifest.reasoning is not None:
        options |= budget
    tools, mode = tools_of(body), mode_of(body)
    structure = tool_structure(
        tools,
        handler.require_template().tool_format,
        mode,
        parallel=body.parallel_tool_calls is not False,
        text=options.get("structure"),
        thinking=handler.manifest.reasoning is not None,
    )
    if structure is not None:
        options["structure"] = structure
        if structure.kind == "tool_calls" and body.ignore_eos:
            raise UsageError("ignore_eos would write on behind a call", "leave it out")
    prompt_ids, left_out = handler.fit_chat(
        [message.for_template() for message in body.messages],
        overflow,
        options,
        [tool.described for tool in tools] if mode != "none" else (),
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )
    return [(prompt_ids, handler.resolve(options, len(prompt_ids)))], left_out


def make_parsers(handler: ModelHandler, body: ChatCompletionRequest, answers: int) -> list[ToolCallParser]:
    """A parser for each answer."""
    mode = mode_of(body)
    form = handler.require_template().tool_format if body.tools and mode != "none" else None
    return [ToolCallParser(form, certain=mode != "auto") for _ in range(answers)]


def tools_of(body: ChatCompletionRequest) -> list[Tool]:
    """The tools of a request."""
    return read_tools([tool.function.model_dump() for tool in body.tools or ()])


def mode_of(body: ChatCompletionRequest) -> str:
    """As `tool_structure` takes it."""
    if isinstance(body.tool_choice, str):
        return body.tool_choice
    return "auto" if body.tool_choice is None else body.tool_choice.function.name
