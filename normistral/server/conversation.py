"""One answered conversation, whichever route it came by: from an internal request to the parts of its answers.

In those, text, reasoning and calls of tools are told apart.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import Request, Response
from pydantic import ValidationError

from normistral.errors import UsageError
from normistral.runtime.chunks import Chunk, ToolCall
from normistral.runtime.options import GenerationConfig
from normistral.runtime.overflow import LeftOut, Overflow
from normistral.runtime.tools import CallDelta, Tool, ToolCallParser, read_tools, tool_structure
from normistral.server.errors import ApiError, describe_validation
from normistral.server.generation import (
    OPENAI_CHAT,
    Events,
    EventStream,
    Framing,
    Generation,
    SequenceOutput,
    unless_gone,
)
from normistral.server.model_handler import ModelHandler
from normistral.server.options import count_choices, read_options, read_reasoning_budget
from normistral.server.residency import ServedModel
from normistral.server.responses import finish_reason
from normistral.server.schemas import AllowedToolChoice, ChatCompletionRequest, NamedTool
from normistral.server.service import Service


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


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that is to be answered.

    Attributes:
        request_id: of the HTTP request.
        choices: answers.
        prompt_tokens: of the rendered conversation.
        left_out: what the policy left out of it.
        created: when it came, in seconds since 1970.
    """

    request_id: str
    body: ChatCompletionRequest
    model: ServedModel
    choices: int
    prompt_tokens: int
    config: GenerationConfig
    generation: Generation
    parsers: Sequence[ToolCallParser]
    left_out: LeftOut | None = None
    created: float = field(default_factory=time.time)

    def parts(self) -> AsyncIterator[AnswerPart]:
        """Parts of its answers, as they come."""
        return read_parts(self.generation.outputs(), self.parsers)

    def told_left_out(self, places: Sequence[int]) -> dict[str, Any]:
        """Field of what the policy left out, none if nothing: messages are numbered as the client's request has them.

        Args:
            places: that number, of each internal message.
        """
        return {} if self.left_out is None else {"left_out": self.left_out.renumbered(places).document()}


async def open_conversation(request: Request, body: ChatCompletionRequest) -> Conversation:
    """Check, render and tokenise a conversation; `answer` then computes it.

    Raises:
        NormistralError: it cannot be answered.
    """
    service: Service = request.app.state.service
    model = service.find(body.model)
    choices = count_choices(body, 1, service.limits)
    if body.continue_final_message and (body.add_generation_prompt or body.messages[-1].role != "assistant"):
        message = "continue_final_message goes on inside a last message of the assistant"
        raise ApiError(400, message, "leave add_generation_prompt out", param="continue_final_message")
    overflow = body.overflow or service.limits.overflow
    prompts, left_out = await service.prepare(model, choices, request, _prepare_chat, model.handler, body, overflow)
    ((prompt_ids, config),) = prompts
    mode = _tool_mode(body)
    form = model.handler.require_template().tool_format if body.tools and mode != "none" else None
    parsers = [ToolCallParser(form, certain=mode != "auto") for _ in range(choices)]
    generation = service.generation(model, prompts, choices, request.state)
    return Conversation(
        request.state.request_id, body, model, choices, len(prompt_ids), config, generation, parsers, left_out
    )


def _prepare_chat(
    handler: ModelHandler, body: ChatCompletionRequest, overflow: Overflow
) -> tuple[list[tuple[list[int], Any]], LeftOut | None]:
    """Prompt and options of a conversation, and what the policy left out of it.

    Raises:
        NormistralError: the request cannot be answered.
    """
    options, budget = read_options(body), read_reasoning_budget(body)
    if handler.manifest.reasoning is not None:
        options |= budget
    tools, mode = read_tools([tool.function.model_dump() for tool in body.tools or ()]), _tool_mode(body)
    structure = tool_structure(
        _callable_tools(body, tools),
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


def _tool_mode(body: ChatCompletionRequest) -> str:
    """As `tool_structure` takes it."""
    match body.tool_choice:
        case NamedTool(function=function):
            return function.name
        case AllowedToolChoice(allowed_tools=allowed):
            return allowed.mode
        case choice:
            return choice or "auto"


def _callable_tools(body: ChatCompletionRequest, tools: list[Tool]) -> list[Tool]:
    """The tools that `tool_choice` allows; raises UsageError where it names one that is not there."""
    if not isinstance(body.tool_choice, AllowedToolChoice):
        return tools
    allowed = {tool.function.name for tool in body.tool_choice.allowed_tools.tools}
    if absent := sorted(allowed - {tool.name for tool in tools}):
        raise UsageError(f"there is no tool {absent[0]!r}", "name some of the tools")
    return [tool for tool in tools if tool.name in allowed]


def as_chat(fields: dict[str, Any], names: Mapping[str, str]) -> ChatCompletionRequest:
    """An internal request from what a route of another API was asked.

    Args:
        names: what that API calls a field, where it calls it otherwise.

    Raises:
        ApiError: a value cannot be.
    """
    try:
        return ChatCompletionRequest.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
    except ValidationError as exc:
        errors = [
            error | {"loc": (*names.get(str(error["loc"][0]), str(error["loc"][0])).split("."), *error["loc"][1:])}
            for error in exc.errors()
        ]
        raise describe_validation(errors) from None


def stream(generation: Generation, events: Events, framing: Framing = OPENAI_CHAT) -> Response:
    """Answer with events."""
    generation.begin()
    return EventStream(events, generation.close, framing)


async def answer_whole(
    request: Request, generation: Generation, gather: Callable[[], Coroutine[Any, Any, dict[str, Any]]]
) -> Response:
    """Answer with one document."""
    with closing(generation):
        generation.begin()
        document = await unless_gone(gather(), request.receive)
    return Response(msgspec.json.encode(document), media_type="application/json")


async def last_of(events: Events) -> dict[str, Any]:
    """The last event, which holds the whole answer."""
    last: dict[str, Any] = {}
    async for event in events:
        last = event
    return last
