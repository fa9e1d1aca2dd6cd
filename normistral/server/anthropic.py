"""Anthropic's /v1/messages: text and tools, whole and as events.

A request becomes an internal one of the same conversation. Whole answers are put together from the same blocks.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from normistral.runtime.chunks import ToolCall
from normistral.runtime.overflow import OVERFLOW_HELP, Overflow
from normistral.runtime.tools import MOST_TOOLS
from normistral.server.conversation import (
    AnswerPart,
    ChatAnswer,
    Conversation,
    answer_whole,
    as_chat,
    open_conversation,
    stream,
)
from normistral.server.errors import ApiError, anthropic_document
from normistral.server.generation import Framing, encode_named
from normistral.server.responses import EVENTS, STATUSES, DecodedRoute, UsageCounter, error_responses
from normistral.server.schemas import (
    BEGINNINGS,
    MOST_MESSAGES,
    CallId,
    NeverTrue,
    Only,
    ReasoningEffort,
    Strict,
    ToolName,
    WithNumbers,
    joined_text,
    require_text,
    type_tag,
)

FRAMING = Framing("text/event-stream", encode_named, b"", anthropic_document)
_NAMES = {"stop": "stop_sequences"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

router = APIRouter(route_class=DecodedRoute)


class AnthropicErrorDetails(BaseModel):
    """What went wrong, for programs."""

    error_code: str


class AnthropicErrorBody(BaseModel):
    """What went wrong."""

    type: str
    message: str
    details: AnthropicErrorDetails | None = None


class AnthropicError(BaseModel):
    """The answer to a request that failed."""

    type: Literal["error"]
    error: AnthropicErrorBody


class _Block(Strict):
    cache_control: dict[str, Any] | None = Field(None, description=BEGINNINGS)


class TextBlock(_Block):
    """A piece of text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(_Block):
    """Reasoning of an earlier answer; models do not read it again."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


class ToolUseBlock(_Block):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]
    caller: dict[str, Any] | None = Field(None, description="Not used: the model calls.")


class ToolResultBlock(_Block):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Annotated[str | list[TextBlock] | None, BeforeValidator(require_text)] = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ToolUseBlock, Tag("Tool_use")]
    | Annotated[ToolResultBlock, Tag("Tool_result")]
    | Annotated[ThinkingBlock, Tag("Thinking")],
    Discriminator(
        lambda block: "Thinking" if type_tag(block) == "Redacted_thinking" else type_tag(block),
        custom_error_type="block_type",
        custom_error_message="this model reads text only; blocks are of type text, tool_use, tool_result, thinking or "
        "redacted_thinking",
    ),
]


class AnthropicMessage(Strict):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class AnthropicTool(_Block):
    """A function that the model may call; there are no other tools."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="true refuses a schema with keywords that cannot be kept to.")
    eager_input_streaming: bool | None = Field(None, description="Not used: arguments come as they are written.")
    defer_loading: NeverTrue = None
    allowed_callers: list[Literal["direct"]] | None = None


class AnthropicToolChoice(Strict):
    """How tools are to be used; tool needs a name."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(WithNumbers):
    """How much to reason; adaptive is without a limit."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)
    display: Literal["summarized", "omitted"] | None = Field(None, description="Not used: reasoning is shown as it is.")


class AnthropicFormat(Strict):
    """Form of the answer."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class AnthropicOutput(Strict):
    """How the answer is to be."""

    effort: ReasoningEffort | None = None
    format: AnthropicFormat | None = None


class ClearedThinking(Strict):
    """Reasoning of earlier turns, which models do not read again anyway."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class AnthropicContextManagement(Strict):
    """What is to be left out of a long conversation; for other contents there is `overflow`."""

    edits: Annotated[list[ClearedThinking], Field(fail_fast=True)] | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens; null is the same as leaving out."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutput | None = None
    output_format: AnthropicFormat | None = Field(None, description="An older place of output_config.format.")
    cache_control: dict[str, Any] | None = Field(None, description=BEGINNINGS)
    context_management: AnthropicContextManagement | None = None
    mcp_servers: Annotated[list[Any] | None, Only("the client calls the tools of MCP servers", [])] = None
    speed: Literal["standard", "fast"] | None = Field(None, description="Not used.")


class MessagesRequest(CountRequest, WithNumbers):
    """POST /v1/messages; null is the same as leaving out."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    overflow: Overflow | None = Field(None, description=f"Extension. {OVERFLOW_HELP} Default: the server's.")
    metadata: dict[str, str | None] | None = Field(None, description="Not used.")
    service_tier: str | None = Field(None, description="Not used.")
    diagnostics: dict[str, Any] | None = Field(None, description="Not used.")
    inference_geo: Annotated[Literal["global"] | None, Only("it is computed where the server is", "global")] = None
    fallbacks: str | list[Any] | None = Field(None, description="Not used: this server declines nothing.")
    thread: dict[str, Any] | None = Field(None, description="Refused: conversations are not kept.")


@router.post(
    "/v1/messages",
    response_model=None,
    responses=error_responses(*STATUSES, model=AnthropicError)
    | {200: {"description": "The answer, or with stream: true its events.", "content": EVENTS}},
)
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    if body.thread is not None:  # by this code its package knows that it has to send the conversation whole
        raise ApiError(400, "thread: conversations are not kept", param="thread", code="thread_unsupported_request")
    turns, places = _as_turns(body)
    fields = _as_fields(body, turns, request) | {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "overflow": body.overflow,
    }
    asked = await open_conversation(request, as_chat(fields, _NAMES))
    left_out = asked.told_left_out(places)
    if body.stream:
        return stream(asked.generation, _events(asked, left_out), FRAMING)
    return await answer_whole(request, asked.generation, lambda: _gather(asked, left_out))


class TokenCount(BaseModel):
    """Tokens of a prompt."""

    input_tokens: int


@router.post("/v1/messages/count_tokens", responses=error_responses(*STATUSES, model=AnthropicError))
async def count_tokens(request: Request, body: CountRequest) -> TokenCount:
    """Count the tokens of a conversation with its tools, and answer nothing."""
    asked = await open_conversation(request, as_chat(_as_fields(body, _as_turns(body)[0], request), _NAMES))
    return TokenCount(input_tokens=asked.prompt_tokens)


async def _gather(asked: Conversation, left_out: dict[str, Any]) -> dict[str, Any]:
    answer, counter = ChatAnswer(), UsageCounter(1)
    ending: dict[str, Any] = {}
    async for part in asked.parts():
        counter.add(0, part.chunk)
        answer.add(part)
        ending = _ending(asked, part)
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    for call in answer.calls:
        arguments = call.parse() if call.is_whole else {}
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return _message(asked, content, _usage(counter) | left_out) | ending


async def _events(asked: Conversation, left_out: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    counter = UsageCounter(1, prompt_tokens=asked.prompt_tokens)
    yield {"type": "message_start", "message": _message(asked, [], _usage(counter) | left_out)}
    counter.prompt_tokens = 0
    index, kind, ending = -1, "", {}
    async for part in asked.parts():
        counter.add(0, part.chunk)
        ending = _ending(asked, part)
        for name, begun, delta in _pieces(part):
            if name != kind or begun.get("id"):
                if kind:
                    yield {"type": "content_block_stop", "index": index}
                index, kind = index + 1, name
                yield {"type": "content_block_start", "index": index, "content_block": {"type": name, **begun}}
            if delta:
                yield {"type": "content_block_delta", "index": index, "delta": delta}
    if kind:
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": ending, "usage": _usage(counter) | left_out}
    yield {"type": "message_stop"}


def _pieces(part: AnswerPart) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Kind of block, how it begins, and what is added to it."""
    pieces: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if part.chunk.reasoning:
        delta = {"type": "thinking_delta", "thinking": part.chunk.reasoning}
        pieces.append(("thinking", {"thinking": "", "signature": ""}, delta))
    if part.text:
        pieces.append(("text", {"text": ""}, {"type": "text_delta", "text": part.text}))
    for call in part.calls:
        begun: dict[str, Any] = {} if call.name is None else {"id": call.id, "name": call.name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": call.arguments} if call.arguments else {}
        pieces.append(("tool_use", begun, delta))
    return pieces


def _ending(asked: Conversation, part: AnswerPart) -> dict[str, Any]:
    stop_text = part.chunk.stop_text
    reason = _STOP_REASONS.get(part.finish_reason or "") if stop_text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop_text}


def _message(asked: Conversation, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{asked.request_id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model.handler.name,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(counter: UsageCounter) -> dict[str, int]:
    """Anthropic counts tokens that were found in a cache apart from the others."""
    return {
        "input_tokens": counter.prompt_tokens - counter.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counter.cached_tokens,
        "output_tokens": counter.completion_tokens,
    }


def _as_turns(body: CountRequest) -> tuple[list[dict[str, Any]], list[int]]:
    """Internal messages, and for each the number of the message that it is of."""
    system = [] if not body.system else [(0, {"role": "system", "content": joined_text(body.system)})]
    numbered = [*system, *((i, turn) for i, message in enumerate(body.messages) for turn in _as_messages(message))]
    if len(numbered) > 1 and numbered[-1][1] == {"role": "assistant", "content": ""}:
        numbered.pop()  # an answer that has no beginning yet
    return [turn for _, turn in numbered], [number for number, _ in numbered]


def _as_fields(body: CountRequest, turns: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Fields of the internal request that decide its prompt."""
    fields: dict[str, Any] = {"model": body.model, "messages": turns}
    if turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
        fields["continue_final_message"] = True  # Anthropic's way to begin the answer
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": tool.model_dump(include={"name", "description", "strict"})
                | {"parameters": tool.input_schema},
            }
            for tool in body.tools
        ]
    if (choice := body.tool_choice) is not None:
        if (choice.type == "tool") != (choice.name is not None):
            raise ApiError(400, "tool_choice has a name with the type tool, and only there", param="tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if (thinking := body.thinking) is not None:
        if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
            raise ApiError(400, "thinking has budget_tokens where it is enabled", param="thinking.budget_tokens")
        handler = request.app.state.service.find(body.model).handler
        if handler.manifest.reasoning is not None and thinking.type != "adaptive":  # others keep to every budget
            fields["max_reasoning_tokens"] = thinking.budget_tokens or 0
    output = body.output_config or AnthropicOutput()
    fields["reasoning_effort"] = output.effort
    if (form := output.format or body.output_format) is not None:
        fields["structured_outputs"] = {"json": form.json_schema}
    return fields


def _as_messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Internal messages of a turn: results come before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    uses = [block for block in message.content if isinstance(block, ToolUseBlock)]
    results = [block for block in message.content if isinstance(block, ToolResultBlock)]
    if (uses and message.role != "assistant") or (results and message.role != "user"):
        raise ApiError(400, "tool_use is the assistant's, and tool_result the user's", param="messages")
    turns: list[dict[str, Any]] = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": ("error: " if block.is_error else "") + joined_text(block.content),
        }
        for block in results
    ]
    if texts or uses or not results:
        turn: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
        if uses:
            turn["tool_calls"] = [
                ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False)).as_message for block in uses
            ]
        turns.append(turn)
    return turns
