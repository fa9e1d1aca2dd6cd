"""Request of OpenAI's /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from normistral.runtime.overflow import OVERFLOW_HELP, Overflow
from normistral.runtime.tools import MOST_TOOLS
from normistral.server.schemas import (
    BEGINNINGS,
    MOST_MESSAGES,
    TOOL_CHOICES,
    CallArguments,
    CallId,
    NeverTrue,
    Only,
    ReasoningEffort,
    Strict,
    ToolName,
    WithNumbers,
    require_text,
    type_tag,
)

_NO_SUMMARY = "reasoning is not summarised; it is in the output as it is"


class InputText(Strict):
    """A piece of text."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=BEGINNINGS)
    parsed: Any = Field(None, description="Not used: what the package openai made of the text.")


Texts = Annotated[list[InputText], Field(fail_fast=True)]
Content = Annotated[str | Annotated[Texts, Field(min_length=1)], BeforeValidator(require_text)]


class InputMessage(Strict):
    """A turn of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: CallArguments
    id: str | None = None
    status: str | None = None
    parsed_arguments: Any = Field(None, description="Not used: what the package openai made of the arguments.")


class InputResult(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[str | Texts, BeforeValidator(require_text), Field(description="No texts if the tool gave none.")]
    id: str | None = None
    status: str | None = None


class InputReasoning(Strict):
    """Reasoning of an earlier answer; models do not read it again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


_KINDS = {
    None: "Message",
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "Result",
    "reasoning": "Reasoning",
}


def _kind_of(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, dict) else ""
    return _KINDS.get(kind) if kind is None or isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[InputCall, Tag("Call")]
    | Annotated[InputResult, Tag("Result")]
    | Annotated[InputReasoning, Tag("Reasoning")],
    Discriminator(
        _kind_of,
        custom_error_type="item_type",
        custom_error_message="items are of type message, function_call, function_call_output or reasoning; clients "
        "that refer to stored items (item_reference) send them whole with store: false",
    ),
]


class ResponseTool(Strict):
    """A function that the model may call; there are no other tools."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Arguments always fit the schema, whatever this says.")
    defer_loading: NeverTrue = None
    allowed_callers: list[Literal["direct"]] | None = None


class ResponseToolChoice(Strict):
    """The one tool to call."""

    type: Literal["function"]
    name: ToolName


class ResponseAllowedTools(Strict):
    """The tools that may be called; the model is told of all."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseToolChoice], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)]


class ResponseTextFormat(Strict):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="Needed for json_schema.")
    strict: bool | None = Field(None, description="The answer always fits the schema, whatever this says.")


class ResponseText(Strict):
    """How the text is to be."""

    format: ResponseTextFormat | None = None
    verbosity: Annotated[Literal["medium"] | None, Only("verbosity cannot be set", "medium")] = None


class ResponseReasoning(Strict):
    """How much to reason."""

    effort: ReasoningEffort | None = None
    context: Literal["auto", "current_turn"] | None = Field(None, description="Earlier reasoning is not read again.")
    mode: Literal["standard"] | None = None
    summary: Annotated[Literal["auto"] | None, Only(_NO_SUMMARY, "auto")] = None
    generate_summary: Annotated[Literal["auto"] | None, Only(_NO_SUMMARY, "auto")] = None


class ResponseStreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_obfuscation: bool | None = Field(None, description="Nothing is padded here, so this changes nothing.")


class ResponsesRequest(WithNumbers):
    """POST /v1/responses; null is the same as leaving out."""

    model: str
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[InputItem],
            Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES),
        ]
    )
    instructions: str | None = Field(None, description="A system message before the input; never kept.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, description="Reasoning included.")
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Annotated[ResponseToolChoice, Tag("Function")] | Annotated[ResponseAllowedTools, Tag("Allowed_tools")],
            Discriminator(type_tag, custom_error_type="tool_choice", custom_error_message=TOOL_CHOICES),
        ]
        | Literal["none", "auto", "required"]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    store: bool | None = Field(None, description="Keep the answer for previous_response_id; false where left out.")
    previous_response_id: str | None = Field(None, description="Goes on from a kept answer.")
    metadata: dict[str, str] | None = Field(None, description="Returned as it is.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto is overflow: drop-oldest, disabled is overflow: error."
    )
    overflow: Overflow | None = Field(None, description=f"Extension. {OVERFLOW_HELP} Default: the server's.")
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        None, description="Not used: reasoning is in the output, as text."
    )
    background: Annotated[Literal[False] | None, Only("answers are not written in the background", False)] = None
    conversation: Annotated[None, Only("conversations are not kept")] = None
    prompt: Annotated[None, Only("there are no stored prompts")] = None
    max_tool_calls: int | None = Field(None, description="Not used: of tools that a server calls, which are none.")
    top_logprobs: Annotated[int | None, Only("ask /v1/chat/completions for log-probabilities", 0)] = None
    user: str | None = Field(None, description="Not used.")
    service_tier: str | None = Field(None, description="Not used.")
    safety_identifier: str | None = Field(None, description="Not used.")
    prompt_cache_key: str | None = Field(None, description=BEGINNINGS)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=BEGINNINGS)
    prompt_cache_retention: str | None = Field(None, description="Not used.")
