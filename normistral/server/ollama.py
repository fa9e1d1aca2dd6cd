"""Ollama's API: /api/chat, /api/generate, /api/tags, /api/ps, /api/show, /api/version.

Each request becomes an internal one of the same conversation; streams are lines of JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec.json import encode
from pydantic import BaseModel, Field

from normistral.runtime.chunks import Timings, ToolCall
from normistral.runtime.overflow import OVERFLOW_HELP, Overflow
from normistral.server.conversation import (
    ChatAnswer,
    Conversation,
    answer_whole,
    as_chat,
    last_of,
    open_conversation,
    stream,
)
from normistral.server.errors import ApiError
from normistral.server.generation import Framing, encode_line, unless_gone
from normistral.server.model_handler import ModelHandler
from normistral.server.residency import ServedModel
from normistral.server.responses import STATUSES, DecodedRoute, error_responses
from normistral.server.schemas import (
    MOST_MESSAGES,
    NeverTrue,
    Only,
    Strict,
    ToolChoice,
    ToolDefinition,
    ToolName,
    WithNumbers,
)
from normistral.server.service import Service

API_VERSION = "0.13.0"  # of Ollama, whose API this is; clients compare it
_LATEST = ":latest"  # every name has it, also where it is left out
_NO_LOGPROBS = "ask /v1/chat/completions for log-probabilities"
_NS = 1_000_000_000
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h|$)")
_UNITS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NEVER = "9999-12-31T23:59:59Z"

_SAME = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "presence_penalty", "frequency_penalty")
_NAMES = {name: f"options.{name}" for name in (*_SAME, "stop")} | {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
}

router = APIRouter(route_class=DecodedRoute)
FRAMING = Framing(
    "application/x-ndjson", lambda event: encode_line(event) + b"\n", b"", lambda error: {"error": str(error)}
)


class OllamaError(BaseModel):
    """The answer to a request that failed."""

    error: str


_ERRORS = error_responses(*STATUSES, model=OllamaError)
_ANSWERS: dict[int | str, dict[str, Any]] = _ERRORS | {
    200: {"description": "Lines of JSON, or with stream: false one.", "content": {"application/x-ndjson": {}}}
}


class CalledOllamaFunction(Strict):
    """A function with its arguments."""

    name: ToolName
    arguments: dict[str, Any]
    index: int | None = None


class CalledOllamaTool(Strict):
    """A call of an earlier answer."""

    function: CalledOllamaFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Strict):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = Field(None, description="Of an earlier answer; models do not read it again.")
    images: Annotated[list[Any] | None, Only("this model reads text only", [])] = None
    tool_calls: list[CalledOllamaTool] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaOptions(WithNumbers):
    """Options of a generation, as in a Modelfile; those of the hardware change no answer and are not used."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    num_predict: int | None = Field(None, ge=-2, description="-1 and -2 are as many as fit.")
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: int | None = Field(
        None, description="With a penalty only -1, as penalties look at everything; 0 is no repeat_penalty."
    )
    mirostat: Annotated[int | None, Only("there is no mirostat", 0)] = None
    tfs_z: Annotated[float | None, Only("there is no tail-free sampling", 1)] = None
    num_ctx: int | None = Field(None, description="Not used: the context is the server's.")
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: Annotated[bool | None, Only("a penalty is for every token", True)] = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: NeverTrue = None
    embedding_only: NeverTrue = None


class OllamaRequest(WithNumbers):
    """Fields of both kinds of generation."""

    model: str
    stream: bool | None = Field(None, description="true where it is left out.")
    format: str | dict[str, Any] | None = Field(None, description='"json", or a JSON schema; "" is text.')
    options: OllamaOptions | None = None
    keep_alive: str | int | float | None = Field(
        None, description="Seconds, or as 5m; below 0 is for ever. Used with --idle-minutes and at most one key."
    )
    think: bool | Literal["low", "medium", "high", "max"] | None = Field(None, description="false is no reasoning.")
    truncate: bool | None = Field(
        None, description="true is overflow: drop-oldest, false is overflow: error. Default: the server's policy."
    )
    shift: Annotated[Literal[False] | None, Only("an answer ends where the context does", False)] = None
    overflow: Overflow | None = Field(None, description=f"Extension. {OVERFLOW_HELP} Default: the server's.")
    template: Annotated[str | None, Only("the template is the model's", "")] = None
    logprobs: Annotated[Literal[False] | None, Only(_NO_LOGPROBS, False)] = None
    top_logprobs: Annotated[int | None, Only(_NO_LOGPROBS, 0)] = None
    # Written here by the Vercel AI SDK's provider
    temperature: float | None = Field(None, description="As in options, which comes first.")
    top_p: float | None = Field(None, description="As in options, which comes first.")
    max_output_tokens: int | None = Field(None, ge=1, description="As num_predict in options, which comes first.")


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True, max_length=MOST_MESSAGES)] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = Field(None, description="Extension: as in /v1/chat/completions.")


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate: one message."""

    prompt: str | None = None
    system: str | None = None
    suffix: Annotated[str | None, Only("text cannot be inserted before a suffix", "")] = None
    images: Annotated[list[Any] | None, Only("this model reads text only", [])] = None
    context: Annotated[list[int] | None, Only("send the conversation to /api/chat", [])] = None
    raw: Annotated[bool | None, Only("for texts without a template there is /v1/completions", False)] = None


class OllamaShowRequest(Strict):
    """POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="An older name of model.")
    verbose: bool | None = None
    system: str | None = Field(None, description="Not used.")
    template: str | None = Field(None, description="Not used.")
    options: dict[str, Any] | None = Field(None, description="Not used.")


@router.post("/api/chat", response_model=None, responses=_ANSWERS)
async def ollama_chat(request: Request, body: OllamaChatRequest) -> Response:
    """Answer a conversation, as Ollama does."""
    model = find_model(request, body.model)
    keep_s = _keep_alive(request, model, body)
    if not body.messages:
        return await _load(request, model, keep_s, {"message": {"role": "assistant", "content": ""}})
    tools = [tool.model_dump() for tool in body.tools] if body.tools else None
    return await _answer(request, body, model, _as_messages(body.messages), tools, _chat_piece)


@router.post("/api/generate", response_model=None, responses=_ANSWERS)
async def ollama_generate(request: Request, body: OllamaGenerateRequest) -> Response:
    """Answer one message, as Ollama does."""
    model = find_model(request, body.model)
    keep_s = _keep_alive(request, model, body)
    if not body.prompt:
        return await _load(request, model, keep_s, {"response": ""})
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt}]
    return await _answer(request, body, model, messages, None, _text_piece)


@router.get("/api/tags", responses=error_responses(401, model=OllamaError))
async def ollama_tags(request: Request) -> dict[str, Any]:
    """The models, as Ollama lists them."""
    service: Service = request.app.state.service
    return {"models": [_describe(model.handler) for model in service.models.values()]}


@router.get("/api/ps", responses=error_responses(401, model=OllamaError))
async def ollama_ps(request: Request) -> dict[str, Any]:
    """The models that are loaded, and until when."""
    service: Service = request.app.state.service
    loaded = [model for model in service.models.values() if model.worker.loaded is not None]
    return {
        "models": [
            _describe(model.handler) | {"expires_at": _time_in(service.residency.expires_in_s(model)), "size_vram": 0}
            for model in loaded
        ]
    }


@router.post("/api/show", responses=_ERRORS)
async def ollama_show(request: Request, body: OllamaShowRequest) -> dict[str, Any]:
    """Describe a model, as Ollama does."""
    name = body.model or body.name
    if not name:
        raise ApiError(400, "model is missing", param="model")
    handler = find_model(request, name).handler
    manifest = handler.manifest
    family = manifest.architecture.model_type
    capabilities = ["completion"]
    if handler.template is not None:
        capabilities += ["tools", *(["thinking"] if manifest.reasoning is not None else [])]
    return {
        "modelfile": f"FROM {handler.name}\n",
        "parameters": "",
        "template": "" if manifest.template is None else manifest.template.text,
        "details": _details(handler),
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": handler.context_length,
            f"{family}.vocab_size": manifest.architecture.vocabulary,
        },
        "capabilities": capabilities,
        "modified_at": manifest.created,
    }


@router.get("/api/version", responses=error_responses(401, model=OllamaError))
async def ollama_version() -> dict[str, str]:
    """The version of Ollama's API that these routes follow."""
    return {"version": API_VERSION}


def find_model(request: Request, name: str) -> ServedModel:
    """The model of a name, with `:latest` or without; raises ApiError."""
    service: Service = request.app.state.service
    return service.find(name if name in service.models else name.removesuffix(_LATEST))


async def _answer(
    request: Request,
    body: OllamaRequest,
    model: ServedModel,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    piece: Any,
) -> Response:
    fields = _read_options(body, model) | {"model": model.handler.name, "messages": messages, "tools": tools}
    asked = await open_conversation(request, as_chat(fields, _NAMES))
    count = len(messages)
    # The prompt of /api/generate is its only message.
    left_out = asked.told_left_out([0] * count if isinstance(body, OllamaGenerateRequest) else range(count))
    if body.stream is not False:
        return stream(asked.generation, _lines(asked, piece, left_out, gather=False), FRAMING)
    return await answer_whole(request, asked.generation, lambda: last_of(_lines(asked, piece, left_out, gather=True)))


async def _lines(
    asked: Conversation, piece: Any, left_out: dict[str, Any], *, gather: bool
) -> AsyncIterator[dict[str, Any]]:
    """Pieces of the answer, and a last line with its figures; with `gather` only that, with the whole answer."""
    answer, sent = ChatAnswer(), 0
    async for part in asked.parts():
        answer.add(part)
        last = part.finish_reason is not None
        finished = answer.calls if last else answer.calls[:-1]  # the latest may still go on
        calls, sent = [] if gather else finished[sent:], sent if gather else len(finished)
        if not gather and (part.text or part.chunk.reasoning or calls):
            yield _frame(asked.model, piece(part.text, part.chunk.reasoning, calls), None)
        if last:
            whole = piece(answer.text, answer.reasoning, answer.calls) if gather else piece("", "", [])
            reason = "length" if part.finish_reason == "length" else "stop"
            yield _frame(asked.model, whole, reason) | _figures(part.chunk.timings) | left_out


def _frame(model: ServedModel, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    done = {"done": False} if reason is None else {"done": True, "done_reason": reason}
    return {"model": model.handler.name, "created_at": _time_in(0.0), **content, **done}


def _chat_piece(text: str, reasoning: str, calls: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["thinking"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.parse()}}
            for call in calls
            if call.is_whole
        ]
    return {"message": message}


def _text_piece(text: str, reasoning: str, calls: list[Any]) -> dict[str, Any]:
    return {"response": text, **({"thinking": reasoning} if reasoning else {})}


def _figures(timings: Timings) -> dict[str, int]:
    """In nanoseconds."""
    total_s = timings.ttft_s + timings.decode_s
    return {
        "total_duration": int(total_s * _NS),
        "load_duration": 0,
        "prompt_eval_count": timings.prompt_tokens,
        "prompt_eval_duration": int(timings.prefill_s * _NS),
        "eval_count": timings.new_tokens,
        "eval_duration": int(max(total_s - timings.prefill_s, 0.0) * _NS),
    }


def _read_options(body: OllamaRequest, model: ServedModel) -> dict[str, Any]:
    options = body.options or OllamaOptions.model_validate({})
    fields: dict[str, Any] = {name: getattr(options, name) for name in _SAME}
    fields |= {"stop": options.stop, "repetition_penalty": options.repeat_penalty}
    for name in ("temperature", "top_p"):
        fields[name] = getattr(body, name) if fields[name] is None else fields[name]
    fields["max_tokens"] = body.max_output_tokens if options.num_predict is None else max(options.num_predict, -1)
    if isinstance(body, OllamaChatRequest) and body.tool_choice is not None:
        choice = body.tool_choice
        fields["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
    if options.repeat_last_n == 0:
        fields["repetition_penalty"] = 1.0
    elif options.repeat_last_n not in (None, -1):
        given = fields["repetition_penalty"] or model.handler.manifest.sampling.repetition_penalty or 1.0
        if given != 1 or options.presence_penalty or options.frequency_penalty:
            message = "options.repeat_last_n: penalties look at everything; leave it out or give -1"
            raise ApiError(400, message, param="options.repeat_last_n")
    fields["overflow"] = body.overflow or {True: "drop-oldest", False: "error", None: None}[body.truncate]
    if isinstance(body.think, str):
        fields["reasoning_effort"] = body.think
    elif body.think is False:
        fields["reasoning_effort"] = "none"
    if isinstance(body.format, dict):
        fields["structured_outputs"] = {"json": body.format}
    elif body.format:
        if body.format != "json":
            raise ApiError(400, 'format is "json" or a JSON schema', param="format")
        fields["response_format"] = {"type": "json_object"}
    return fields


def _as_messages(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """Internal messages: calls without an id get one, and results belong to calls in their order."""
    converted, open_calls, count = [], [], 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                call_id, count = call.id or f"call{count:05d}", count + 1
                arguments = json.dumps(call.function.arguments, ensure_ascii=False)
                calls.append(ToolCall(call_id, call.function.name, arguments).as_message)
            turn["tool_calls"], open_calls = calls, [call["id"] for call in calls]
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id or (open_calls.pop(0) if open_calls else "none")
            if message.tool_name is not None:
                turn["name"] = message.tool_name
        converted.append(turn)
    return converted


async def _load(request: Request, model: ServedModel, keep_s: float | None, content: dict[str, Any]) -> Response:
    """The answer to a request without a prompt, which loads the model or, with keep_alive 0, frees it."""
    service: Service = request.app.state.service
    if keep_s != 0:
        await unless_gone(service.residency.load(model), request.receive)
    frame = _frame(model, content, "unload" if keep_s == 0 else "load")
    return Response(encode(frame), media_type="application/json")


def _keep_alive(request: Request, model: ServedModel, body: OllamaRequest) -> float | None:
    """Seconds for which the request keeps the model; None where it does not say, or has no say."""
    service: Service = request.app.state.service
    keep_s = None if body.keep_alive is None else _read_seconds(body.keep_alive)
    return keep_s if service.residency.keep(model, keep_s) else None


def _read_seconds(value: str | float) -> float:
    """A duration as Ollama writes it: seconds, or numbers with units (Go's time.ParseDuration); infinity below 0.

    Raises:
        ApiError: it is none.
    """
    text = str(value).strip()
    magnitude = text.lstrip("+-")
    pieces = _DURATION.findall(magnitude)
    if "".join(number + unit for number, unit in pieces) != magnitude or not magnitude:
        raise ApiError(400, "keep_alive is a number of seconds, or a duration such as 5m or 1h30m", param="keep_alive")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in pieces)
    return math.inf if text.startswith("-") and seconds else seconds


def _describe(handler: ModelHandler) -> dict[str, Any]:
    name = handler.name if ":" in handler.name else handler.name + _LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": handler.manifest.created,
        "size": handler.manifest.total_bytes,
        "digest": handler.manifest.sha256,
        "details": _details(handler),
    }


def _details(handler: ModelHandler) -> dict[str, Any]:
    manifest = handler.manifest
    family = manifest.architecture.model_type
    return {
        "parent_model": "",
        "format": manifest.format,
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": manifest.recipe.weights,
    }


def _time_in(seconds: float | None) -> str:
    """The time so much later; None and what no calendar has are never."""
    try:
        moment = datetime.now(UTC) + timedelta(seconds=math.inf if seconds is None else seconds)
    except OverflowError:
        return _NEVER
    return moment.isoformat().replace("+00:00", "Z")
