"""Requests as OpenAI's clients send them; what is not known or cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field

from normistral.server.fields import CommonRequest, NeverTrue, Only, Strict

_MOST_MESSAGES = 1024
_NO_TOOLS = "tools and functions are not supported; ask for JSON with response_format"


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _require_text(content: Any) -> Any:
    """Say what is wrong with pictures and sounds before a list of types does."""
    if isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and part.get("type", "text") != "text":
                raise ValueError("this model reads text only; parts have to be of type text")
    return content


class Message(Strict):
    """A turn of the conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="developer is another name of system."),
    ]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)],
        BeforeValidator(_require_text),
        Field(description="Text; parts of text are joined by line ends."),
    ]
    reasoning_content: str | None = Field(None, description="Of an earlier answer; models do not read it again.")
    name: Annotated[None, Only("the template knows no names")] = None
    tool_calls: Annotated[None, Only(_NO_TOOLS)] = None
    tool_call_id: Annotated[None, Only(_NO_TOOLS)] = None
    function_call: Annotated[None, Only(_NO_TOOLS)] = None
    refusal: Annotated[None, Only("this server writes no refusals")] = None
    audio: Annotated[None, Only("this server does not hear or speak")] = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class ChatCompletionRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Needs logprobs.")
    parallel_tool_calls: bool | None = Field(None, description="There are no tools, so this changes nothing.")
    tools: Annotated[Annotated[list[Any], Field(max_length=0)] | None, Only(_NO_TOOLS, [])] = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]] | None, Field(fail_fast=True)] = None
    functions: Annotated[None, Only(_NO_TOOLS)] = None
    function_call: Annotated[None, Only(_NO_TOOLS)] = None
    audio: Annotated[None, Only("this server does not speak")] = None
    prediction: Annotated[None, Only("answers cannot be predicted")] = None
    reasoning_effort: Annotated[None, Only("there is max_reasoning_tokens")] = None
    verbosity: Annotated[None, Only("verbosity cannot be set")] = None
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
    echo: NeverTrue = Field(None, description="The prompt is not repeated.")
    best_of: Annotated[int | None, Field(ge=1, le=1)] = None
    suffix: Annotated[None, Only("text cannot be inserted before a suffix")] = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | Sequence[int]], self.prompt)
