"""Requests of chat and text completions, and types of other APIs' requests; nothing is ignored in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import core_schema

from normistral.runtime.options import NUMERIC_OPTIONS
from normistral.runtime.overflow import OVERFLOW_HELP, Overflow
from normistral.runtime.tools import MOST_TOOLS

_STOPS = 16
_BREAKERS = 64
_BIASES = 1024
MOST_MESSAGES = 1024
_ID_CHARACTERS = 256
_GUIDED = "it became structured_outputs"
BEGINNINGS = "Not used: beginnings are found by their tokens."
TOOL_CHOICES = "it is 'none', 'auto' or 'required', or an object of type function or allowed_tools"
_NO_FUNCTIONS = "functions became tools; there are tools, tool_choice and tool_calls"


class Strict(BaseModel):
    """An object whose fields are all known and of their very types; unknown ones may be there if they are null.

    Null asks for nothing, and clients write it for every field that their package knows and the caller left out.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and None in fields.values():
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class WithNumbers(Strict):
    """An object in whose whole numbers 8192.0 is 8192: JSON has one kind, and some clients write all with a point."""

    @model_validator(mode="before")
    @classmethod
    def _as_whole(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not any(type(value) is float for value in fields.values()):
            return fields
        whole = {name for name, field in cls.model_fields.items() if _is_whole(field.annotation)}
        return {
            name: int(value) if name in whole and type(value) is float and value.is_integer() else value
            for name, value in fields.items()
        }


def _is_whole(annotation: Any) -> bool:
    kinds = {annotation, *get_args(annotation)}
    return int in kinds and float not in kinds


@dataclass(frozen=True, slots=True)
class Only:
    """Marks a field that takes null and values that ask for nothing; the others are refused with a reason."""

    why: str
    neutral: Any = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Look at the value before its type does."""
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value is None or (value == self.neutral and isinstance(value, bool) == isinstance(self.neutral, bool)):
            return value
        raise ValueError(self.why)


NeverTrue = Annotated[Literal[False] | None, Only("this cannot be switched on", False)]
StopTexts = Annotated[
    str | Annotated[list[str], Field(fail_fast=True, max_length=_STOPS)] | None,
    Field(description='Texts that end the answer; "" is none.'),
]
TokenBias = Annotated[float, Field(ge=-100, le=100)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JsonSchemaFormat(Strict):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The answer always fits the schema, whatever this says.")


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


def type_tag(value: Any) -> str | None:
    """Tag of an object by its `type`; not in lower case, as an error's path to a field leaves such steps out."""
    kind = value.get("type") if isinstance(value, dict) else None
    return kind.capitalize() if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("Text")]
    | Annotated[JsonObjectFormat, Tag("Json_object")]
    | Annotated[SchemaFormat, Tag("Json_schema")],
    Discriminator(
        type_tag,
        custom_error_type="format_type",
        custom_error_message="it is an object whose type is one of 'text', 'json_object', 'json_schema'",
    ),
]


class StructuredOutputs(Strict):
    """The form of the answer, one of these (an extension, as in vLLM)."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1)] | None = None
    grammar: str | None = Field(None, description="In llguidance's dialect of Lark.")
    json_object: bool | None = None


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool | None = Field(None, description="A last event with the usage of the whole request.")
    include_obfuscation: bool | None = Field(None, description="Nothing is padded here, so this changes nothing.")


_OPENAI_OPTIONS = ("seed", "temperature", "top_p", "max_new_tokens", "frequency_penalty", "presence_penalty")
_HIGHEST = {"max_new_tokens": None, "seed": 2**63}  # where it is not the option's own
_SEED = "The same text again, while system_fingerprint is the same and not null; -1 is none."


def _option(name: str, gt: float | None = None) -> Any:
    """Field of an option as `NUMERIC_OPTIONS` declares it; `gt` is an exclusive lower bound in place of its own."""
    spec = NUMERIC_OPTIONS[name]
    low = spec.low if spec.at_minus_one == "refused" else -1
    at_least = None if gt is not None else _as_written(low)
    description = _SEED if name == "seed" else spec.help if name in _OPENAI_OPTIONS else f"Extension: {spec.help}"
    return Field(None, ge=at_least, gt=gt, le=_as_written(_HIGHEST.get(name, spec.high)), description=description)


def _as_written(bound: float | None) -> float | None:
    """int numbers without a decimal point, as a reader of the description expects them."""
    return bound if bound is None or bound != int(bound) else int(bound)


def _require_some(tokens: int | None) -> int | None:
    if tokens == 0:
        raise ValueError("an answer has at least 1 token; -1 is as many as fit")
    return tokens


class CommonRequest(WithNumbers):
    """Fields of both kinds of completion; null is the same as leaving out."""

    model: str
    n: int | None = Field(None, ge=1, description="Answers; with a seed, answer i has the seed + i.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopTexts = None
    seed: int | None = _option("seed")
    temperature: float | None = _option("temperature")
    top_p: float | None = _option("top_p")
    max_tokens: Annotated[int | None, AfterValidator(_require_some)] = _option("max_new_tokens")
    response_format: ResponseFormat | None = None
    # Extensions
    top_k: int | None = _option("top_k")
    min_p: float | None = _option("min_p")
    repetition_penalty: float | None = _option("repetition_penalty")
    repeat_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Extension: llama.cpp's name of repetition_penalty."
    )
    typical_p: float | None = _option("typical_p", gt=0)
    dry_multiplier: float | None = _option("dry_multiplier")
    dry_base: float | None = _option("dry_base")
    dry_allowed_length: int | None = _option("dry_allowed_length")
    dry_penalty_last_n: int | None = _option("dry_penalty_last_n")
    dry_sequence_breakers: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=_BREAKERS)] | None
    ) = Field(None, description="Extension: texts across which DRY looks for no sequence.")
    xtc_probability: float | None = _option("xtc_probability")
    xtc_threshold: float | None = _option("xtc_threshold")
    max_reasoning_tokens: int | None = _option("max_reasoning_tokens")
    ignore_eos: bool | None = Field(None, description="Extension: go on past the end of the answer.")
    structured_outputs: StructuredOutputs | None = None
    presence_penalty: float | None = _option("presence_penalty")
    frequency_penalty: float | None = _option("frequency_penalty")
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], TokenBias], Field(max_length=_BIASES)] | None
    ) = Field(None, description="Added to the logits of tokens, by their ids.")
    # Asks for nothing, or for nothing that changes the answer
    keep_alive: str | int | float | None = Field(None, description="Not used: the server decides.")
    user: str | None = Field(None, description="Not used.")
    metadata: dict[str, str] | None = Field(None, description="Not used.")
    store: NeverTrue = Field(None, description="Nothing is ever stored.")
    service_tier: str | None = Field(None, description="Not used.")
    safety_identifier: str | None = Field(None, description="Not used.")
    prompt_cache_key: str | None = Field(None, description=BEGINNINGS)
    prompt_cache_retention: str | None = Field(None, description="Not used.")
    cache_prompt: bool | None = Field(None, description="Not used: beginnings are always looked for.")
    skip_special_tokens: Annotated[bool | None, Only("control tokens are never shown", True)] = None
    min_tokens: Annotated[int | None, Only("an answer has no least length", 0)] = None
    repeat_last_n: Annotated[int | None, Only("penalties look at everything", -1)] = None
    mirostat: Annotated[int | None, Only("there is no mirostat", 0)] = None
    tfs_z: Annotated[float | None, Only("there is no tail-free sampling", 1)] = None
    top_a: Annotated[float | None, Only("there is no top-a sampling", 0)] = None
    best_of: Annotated[int | None, Field(ge=1, le=1)] = None
    use_beam_search: Annotated[bool | None, Only("there is no beam search", False)] = None
    length_penalty: Annotated[float | None, Only("there is no beam search, whose beams it weighs", 1)] = None
    id_slot: Annotated[int | None, Only("the server chooses the slot", -1)] = None
    guided_json: Annotated[None, Only(_GUIDED)] = None
    guided_regex: Annotated[None, Only(_GUIDED)] = None
    guided_choice: Annotated[None, Only(_GUIDED)] = None
    guided_grammar: Annotated[None, Only(_GUIDED)] = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    id: str | None = Field(None, description="Not used: LangChain's name of the piece.")
    index: int | str | None = Field(None, description="Not used: of a streamed piece.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    cache_control: dict[str, Any] | None = Field(None, description=BEGINNINGS)
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=BEGINNINGS)


def _none_as_empty(arguments: str) -> str:
    """Some clients write no arguments as an empty text."""
    return arguments if arguments.strip() else "{}"


def require_text(content: Any) -> Any:
    """Say what is wrong with pictures and sounds before a list of types does; another model's refusal is its text."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = str(part.get("type", "text")) if isinstance(part, dict) else "text"
        if kind == "refusal":
            parts.append({"type": "text", "text": part.get("refusal")})
        elif kind.endswith("text"):
            parts.append(part)
        else:
            raise ValueError("this model reads text only; parts have to be of type text")
    return parts


def joined_text(content: str | list[Any] | None) -> str:
    """Text of a content; its parts are lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())


CallId = Annotated[str, Field(min_length=1, max_length=_ID_CHARACTERS)]
CallArguments = Annotated[str, AfterValidator(_none_as_empty)]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class NamedFunction(Strict):
    """The name of a function."""

    name: ToolName


class FunctionDefinition(NamedFunction):
    """A function that the model may call."""

    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments, an object; none: no arguments."
    )
    strict: bool | None = Field(None, description="Arguments always fit the schema, whatever this says.")


class ToolDefinition(Strict):
    """A tool; there are functions only."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedTool(Strict):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    """Some of the tools, and whether one has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)]


class AllowedToolChoice(Strict):
    """The tools that may be called; the model is told of all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Annotated[
        Annotated[NamedTool, Tag("Function")] | Annotated[AllowedToolChoice, Tag("Allowed_tools")],
        Discriminator(type_tag, custom_error_type="tool_choice", custom_error_message=TOOL_CHOICES),
    ]
    | Literal["none", "auto", "required"]
)


class CalledFunction(Strict):
    """A function with its arguments."""

    name: ToolName
    arguments: CallArguments = Field(
        description="A JSON object, or as much of one as there is in a call that was cut off."
    )
    parsed_arguments: Any = Field(None, description="Not used: what the package openai made of the arguments.")


class CalledTool(Strict):
    """A call of an earlier answer."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="Not used: of a streamed call.")


class Message(Strict):
    """A turn of the conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        Field(description="developer is another name of system."),
    ]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)] | None,
        BeforeValidator(require_text),
        Field(
            description="Text; parts of text are joined by line ends. null only beside tool_calls, no parts there and "
            "of the role tool."
        ),
    ] = None
    reasoning_content: str | None = Field(None, description="Of an earlier answer; models do not read it again.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    reasoning_details: list[Any] | None = Field(None, description="Not used: OpenRouter's form of reasoning_content.")
    thinking_blocks: list[Any] | None = Field(None, description="Not used: LiteLLM's form of reasoning_content.")
    name: str | None = Field(None, description="For templates that read it.")
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = Field(None, max_length=_ID_CHARACTERS, description="Of the role tool.")
    function_call: Annotated[None, Only(_NO_FUNCTIONS)] = None
    refusal: str | None = Field(None, description="Of another model's answer: its text where there is no content.")
    audio: Annotated[None, Only("this server does not hear or speak")] = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed: Any = Field(None, description="Not used: what the package openai made of the text.")
    provider_specific_fields: dict[str, Any] | None = Field(None, description="Not used: LiteLLM's.")

    @model_validator(mode="after")
    def _check(self) -> Message:
        self.content = self.refusal if self.content is None else self.content
        if not self.tool_calls and (self.content is None or (self.content == [] and self.role != "tool")):
            raise ValueError("content should be a valid string or list of text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are of the assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id is for the role tool, and needed there")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": joined_text(self.content)}
        message |= self.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump(include={"id": True, "type": True, "function": {"name", "arguments"}})
                for call in self.tool_calls
            ]
        return message


class ChatTemplateOptions(Strict):
    """Variables of chat templates, as vLLM and llama-server take them."""

    enable_thinking: bool | None = Field(None, description="false is no reasoning.")


class ChatCompletionRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int | None, AfterValidator(_require_some)] = Field(
        None, ge=-1, description="The same as max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Needs logprobs.")
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = Field(
        None, description="auto (default) is text or calls, required is calls; a named tool is called once."
    )
    parallel_tool_calls: bool | None = Field(None, description="false is at most one call.")
    modalities: Annotated[list[Literal["text"]] | None, Field(fail_fast=True)] = None
    functions: Annotated[Annotated[list[Any], Field(max_length=0)] | None, Only(_NO_FUNCTIONS, [])] = None
    function_call: Annotated[Literal["none"] | None, Only(_NO_FUNCTIONS, "none")] = None
    audio: Annotated[None, Only("this server does not speak")] = None
    prediction: Annotated[None, Only("answers cannot be predicted")] = None
    reasoning_effort: ReasoningEffort | None = Field(
        None,
        description="Most tokens of a thinking model's reasoning: none 0, minimal 256, low 1024, medium 4096, beyond "
        "that no limit.",
    )
    chat_template_kwargs: ChatTemplateOptions | None = None
    overflow: Overflow | None = Field(None, description=f"Extension. {OVERFLOW_HELP} Default: the server's.")
    add_generation_prompt: Annotated[
        bool | None, Field(description="Extension: false lets the model go on behind the last message as it is.")
    ] = None
    continue_final_message: bool | None = Field(
        None, description="Extension: go on inside the last message, which has to be the assistant's."
    )
    verbosity: Annotated[Literal["medium"] | None, Only("verbosity cannot be set", "medium")] = None
    prompt_cache_options: dict[str, Any] | None = Field(None, description=BEGINNINGS)
    web_search_options: Annotated[None, Only("this server searches nothing")] = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)],
        Field(description="Text or token ids, or a list of them: then each has n answers."),
    ]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="Repeat the prompt before the answer, with its log-probabilities.")
    suffix: Annotated[Literal[""] | None, Only("text cannot be inserted before a suffix", "")] = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | Sequence[int]], self.prompt)
