"""One answered conversation, whichever route it came by: from an internal request to the parts of its answers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import Request, Response
from pydantic import ValidationError

from normistral.runtime.options import GenerationConfig
from normistral.runtime.overflow import LeftOut
from normistral.runtime.tools import ToolCallParser
from normistral.server.answers import AnswerPart, make_parsers, prepare_chat, read_parts
from normistral.server.errors import ApiError, describe_validation
from normistral.server.generation import OPENAI_CHAT, Events, EventStream, Framing, Generation, unless_gone
from normistral.server.options import count_choices, require_stream_options
from normistral.server.residency import ServedModel
from normistral.server.schemas import ChatCompletionRequest
from normistral.server.service import Service


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

    def stopped_by_text(self, part: AnswerPart) -> bool:
        """Whether a stop text ended the answer, by its last part."""
        stop_ids = self.model.handler.manifest.stop_token_ids
        return bool(self.body.stop) and part.finish_reason == "stop" and part.chunk.token_id not in stop_ids


async def open_conversation(request: Request, body: ChatCompletionRequest) -> Conversation:
    """Check, render and tokenise a conversation; `answer` then computes it.

    Raises:
        NormistralError: it cannot be answered.
    """
    service: Service = request.app.state.service
    model = service.find(body.model)
    require_stream_options(body)
    choices = count_choices(body, 1, service.limits)
    if body.continue_final_message and (body.add_generation_prompt or body.messages[-1].role != "assistant"):
        message = "continue_final_message goes on inside a last message of the assistant"
        raise ApiError(400, message, "leave add_generation_prompt out", param="continue_final_message")
    overflow = body.overflow or service.limits.overflow
    prompts, left_out = await service.prepare(model, choices, request, prepare_chat, model.handler, body, overflow)
    ((prompt_ids, config),) = prompts
    parsers = make_parsers(model.handler, body, choices)
    generation = service.generation(model, prompts, choices, request.state)
    return Conversation(
        request.state.request_id, body, model, choices, len(prompt_ids), config, generation, parsers, left_out
    )


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
