"""OpenAI's /v1/responses: text in and out, tools, events; and answers kept for `previous_response_id`.

A request becomes an internal one of the same conversation. Whole answers are the last event of a stream.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec.json import decode, encode
from pydantic import BaseModel

from normistral.runtime.chunks import ToolCall
from normistral.server.conversation import (
    AnswerPart,
    Conversation,
    answer_whole,
    as_chat,
    last_of,
    open_conversation,
    stream,
)
from normistral.server.errors import ApiError
from normistral.server.generation import Framing, encode_named
from normistral.server.responses import EVENTS, STATUSES, DecodedRoute, UsageCounter, error_responses
from normistral.server.responses_request import (
    InputCall,
    InputMessage,
    InputResult,
    ResponseAllowedTools,
    ResponsesRequest,
    ResponseToolChoice,
)
from normistral.server.schemas import joined_text

_KEPT_ANSWERS, _KEPT_BYTES = 256, 8 * 2**20  # of each key


def describe_error(error: ApiError, number: int = 0) -> dict[str, Any]:
    """The event of an error; every field but `param` has to have a value.

    Args:
        number: of the events before it.
    """
    code = error.code or error.document["error"]["type"]
    return {"type": "error", "sequence_number": number, "code": code, "message": str(error), "param": error.param}


FRAMING = Framing("text/event-stream", encode_named, b"", describe_error)
_ERRORS = error_responses(*STATUSES)
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens"}

router = APIRouter(route_class=DecodedRoute)


class ResponseStore:
    """Conversations of answers, in memory only: at most 256 and 8 MiB for each key, the oldest going first."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[str, bytes]] = {}

    def add(self, tenant: str, response_id: str, messages: list[dict[str, Any]]) -> None:
        """Keep a conversation with its answer."""
        kept = self._kept.setdefault(tenant, OrderedDict())
        kept[response_id] = encode(messages)
        while len(kept) > _KEPT_ANSWERS or sum(map(len, kept.values())) > _KEPT_BYTES:
            kept.popitem(last=False)

    def find(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """The conversation; raises ApiError where it is not there or another key's."""
        kept = self._kept.get(tenant)
        found = None if kept is None else kept.get(response_id)
        if found is None:
            raise ApiError(
                404,
                "there is no answer of that id; old ones are dropped",
                param="previous_response_id",
                code="not_found",
            )
        messages: list[dict[str, Any]] = decode(found)
        return messages


@router.post(
    "/v1/responses",
    response_model=None,
    responses=_ERRORS | {200: {"description": "The answer, or with stream: true its events.", "content": EVENTS}},
)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answer an input."""
    store: ResponseStore | None = request.app.state.response_store
    tenant: str = request.state.tenant
    if store is None and (body.store or body.previous_response_id is not None):
        field = "store" if body.store else "previous_response_id"
        raise ApiError(400, f"{field}: this server keeps no answers", "start it with --store", param=field)
    earlier = []
    if store is not None and body.previous_response_id is not None:
        earlier = store.find(tenant, body.previous_response_id)
    own, places = _as_messages(body)
    messages = [*earlier, *own]
    asked = await open_conversation(request, as_chat(_as_fields(body, messages), _NAMES))
    # The conversation as the client counts it: kept messages, then its items.
    counted = [*([0] if body.instructions else []), *range(len(earlier)), *(len(earlier) + place for place in places)]
    writer = _Writer(asked, body, store if body.store else None, tenant, messages, counted)
    if body.stream:
        return stream(asked.generation, writer.events(), FRAMING._replace(describe=writer.describe_error))

    async def gather() -> dict[str, Any]:
        document: dict[str, Any] = (await last_of(writer.events()))["response"]
        return document

    return await answer_whole(request, asked.generation, gather)


class _Writer:
    """Events of one response."""

    def __init__(
        self,
        asked: Conversation,
        body: ResponsesRequest,
        store: ResponseStore | None,
        tenant: str,
        messages: list[dict[str, Any]],
        counted: Sequence[int],
    ) -> None:
        self._left_out = asked.told_left_out(counted)
        self._asked, self._body, self._store = asked, body, store
        self._tenant, self._messages = tenant, messages
        self._id = asked.request_id
        self._sequence = 0
        self._counter = UsageCounter(1)
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """All events, the last with the whole response."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        reason = "stop"
        async for part in self._asked.parts():
            self._counter.add(0, part.chunk)
            for event in self._part(part):
                yield event
            reason = part.finish_reason or reason
        if not self._output and self._open is None:  # an answer without a word is an empty message
            for event in self._begin("message"):
                yield event
        status = "incomplete" if reason == "length" else "completed"
        for event in self._end(status):
            yield event
        self._keep()
        yield self._event(f"response.{status}", response=self._response(status))

    def describe_error(self, error: ApiError) -> dict[str, Any]:
        """The event of an error behind those that there were."""
        return describe_error(error, self._sequence)

    def _part(self, part: AnswerPart) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if part.chunk.reasoning:
            events += self._write("reasoning", part.chunk.reasoning)
        if part.text:
            events += self._write("message", part.text)
        for call in part.calls:
            if call.name is not None:
                events += self._end("completed")
                events += self._begin("function_call", call_id=call.id, name=call.name, arguments="")
            if call.arguments and self._open is not None:
                self._open["arguments"] += call.arguments
                events.append(self._of_item("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _write(self, kind: str, text: str) -> list[dict[str, Any]]:
        events = []
        if self._open is None or self._open["type"] != kind:
            events += self._end("completed")
            events += self._begin(kind)
        assert self._open is not None
        content = self._open["content"][0]
        content["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        events.append(self._of_item(f"response.{content['type']}.delta", content_index=0, delta=text, **more))
        return events

    def _begin(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}[kind]
        item: dict[str, Any] = {"type": kind, "id": f"{prefix}_{self._id}-{len(self._output)}", "status": "in_progress"}
        part: dict[str, Any] | None = None
        if kind == "message":
            item |= {"role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open = item | fields
        events = [self._event("response.output_item.added", output_index=len(self._output), item=_copy(self._open))]
        if part is not None:
            self._open["content"].append(part)
            events.append(self._of_item("response.content_part.added", content_index=0, part=dict(part)))
        return events

    def _end(self, status: str) -> list[dict[str, Any]]:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            events = [self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)]
        else:
            content = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            kind, text = content["type"], content["text"]
            events = [
                self._of_item(f"response.{kind}.done", content_index=0, text=text, **more),
                self._of_item("response.content_part.done", content_index=0, part=dict(content)),
            ]
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=_copy(item)))
        self._output.append(item)
        self._open = None
        return events

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _response(self, status: str) -> dict[str, Any]:
        body, config, usage = self._body, self._asked.config, self._counter
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
        choice = body.tool_choice
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(self._asked.created),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._asked.model.handler.name,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": self._store is not None,
            "temperature": config.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": config.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                **self._left_out,
            },
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _keep(self) -> None:
        if self._store is None:
            return
        text = "".join(item["content"][0]["text"] for item in self._output if item["type"] == "message")
        calls = [
            ToolCall(item["call_id"], item["name"], item["arguments"]).as_message
            for item in self._output
            if item["type"] == "function_call"
        ]
        answer: dict[str, Any] = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
        self._store.add(self._tenant, f"resp_{self._id}", [*self._messages, answer])


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})


def _as_messages(body: ResponsesRequest) -> tuple[list[dict[str, Any]], list[int]]:
    """Internal messages of the input, and for each the number of its item; calls behind each other are one answer's."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}], [0]
    messages: list[dict[str, Any]] = []
    places: list[int] = []
    for place, item in enumerate(body.input):
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": joined_text(item.content)})
            case InputResult():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined_text(item.output)})
            case InputCall():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                call = ToolCall(item.call_id, item.name, item.arguments)
                messages[-1].setdefault("tool_calls", []).append(call.as_message)
        places += [place] * (len(messages) - len(places))
    return messages, places


def _as_fields(body: ResponsesRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*system, *messages],
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "tool_choice": body.tool_choice,
        "overflow": body.overflow or {"auto": "drop-oldest", "disabled": "error"}.get(body.truncation or ""),
    }
    match body.tool_choice:
        case ResponseToolChoice(name=name):
            fields["tool_choice"] = _named(name)
        case ResponseAllowedTools(mode=mode, tools=allowed):
            choice = {"mode": mode, "tools": [_named(tool.name) for tool in allowed]}
            fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": choice}
    if body.tools:
        fields["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools]
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "text.format.schema is missing", param="text.format.schema")
        fields["structured_outputs"] = {"json": form.json_schema}
    elif form is not None and form.type == "json_object":
        fields["response_format"] = {"type": "json_object"}
    return fields


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
