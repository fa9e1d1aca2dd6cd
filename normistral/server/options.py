"""Conversion of request fields to `GenerationConfig` options."""

from __future__ import annotations

import sys
from typing import Any

from normistral.errors import UsageError
from normistral.runtime.options import NUMERIC_OPTIONS
from normistral.runtime.structured.structure import Structure
from normistral.server.errors import ApiError
from normistral.server.limits import ServerLimits
from normistral.server.schemas import (
    ChatCompletionRequest,
    CommonRequest,
    CompletionRequest,
    JsonObjectFormat,
    SchemaFormat,
)

# Options that a request calls as the library does, and that are the same for chat and text completions.
_SAME = (
    *(name for name in NUMERIC_OPTIONS if name in CommonRequest.model_fields),
    "dry_sequence_breakers",
    "ignore_eos",
)
_EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096}


def read_options(body: CommonRequest) -> dict[str, Any]:
    """Options of a request, as fields of `GenerationConfig`.

    Raises:
        ApiError, UsageError: fields that contradict each other, or a malformed structure.
    """
    options = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.top_p == 0:  # as if it were the least number: the likeliest token alone
        options["top_p"] = sys.float_info.min
    penalty = body.repeat_penalty
    if penalty is not None and options.setdefault("repetition_penalty", penalty) != penalty:
        message = "repetition_penalty and repeat_penalty are the same, and differ"
        raise ApiError(400, message, "give one", param="repeat_penalty")
    if body.stop is not None:
        options["stop"] = [text for text in ([body.stop] if isinstance(body.stop, str) else body.stop) if text]
    if body.logit_bias:
        options["logit_bias"] = {int(token_id): value for token_id, value in body.logit_bias.items()}
    if (most := _max_tokens(body)) is not None:
        options["max_new_tokens"] = min(most, NUMERIC_OPTIONS["max_new_tokens"].high)  # the server has less anyway
    if (logprobs := _logprobs(body)) is not None:
        options["logprobs"] = logprobs
        if isinstance(body, CompletionRequest) and body.echo:
            options["prompt_logprobs"] = logprobs
    if (structure := _structure(body)) is not None:
        options["structure"] = structure
    return options


def read_reasoning_budget(body: ChatCompletionRequest) -> dict[str, int]:
    """Tokens that `reasoning_effort` and `enable_thinking` leave for reasoning, as an option; none without a limit.

    A model without reasoning keeps to every such limit, so for that they mean nothing.

    Raises:
        ApiError: they, or `max_reasoning_tokens`, contradict each other.
    """
    limits: dict[str, int | None] = {}
    if body.reasoning_effort is not None:
        limits["reasoning_effort"] = _EFFORTS.get(body.reasoning_effort)
    thinking = body.chat_template_kwargs and body.chat_template_kwargs.enable_thinking
    if thinking is not None and (not thinking or 0 in limits.values()):
        limits["enable_thinking"] = None if thinking else 0
    if body.max_reasoning_tokens is not None:
        limits["max_reasoning_tokens"] = body.max_reasoning_tokens
    if len(set(limits.values())) > 1:
        raise ApiError(400, f"{' and '.join(limits)} ask for different limits", "give one", param=next(iter(limits)))
    limit = next(iter(limits.values()), None)
    return {} if limit is None else {"max_reasoning_tokens": limit}


def count_choices(body: CommonRequest, prompts: int, limits: ServerLimits) -> int:
    """Number of sequences of a request.

    Raises:
        ApiError: more than the server writes for one request; or options of a stream without a stream.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for streams", "give stream: true", param="stream_options")
    choices = (body.n or 1) * prompts
    if choices > limits.choices:
        raise ApiError(
            400, f"{choices} answers are more than this server writes for a request ({limits.choices})", param="n"
        )
    return choices


def _max_tokens(body: CommonRequest) -> int | None:
    newer = body.max_completion_tokens if isinstance(body, ChatCompletionRequest) else None
    if newer is not None and body.max_tokens is not None and newer != body.max_tokens:
        raise ApiError(
            400, "max_tokens and max_completion_tokens are the same limit, and differ", param="max_completion_tokens"
        )
    return body.max_tokens if newer is None else newer


def _logprobs(body: CommonRequest) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    assert isinstance(body, ChatCompletionRequest)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _structure(body: CommonRequest) -> Structure | None:
    wanted: list[Structure] = []
    match body.response_format:
        case JsonObjectFormat():
            wanted.append(Structure.json_object())
        case SchemaFormat(json_schema=described):
            wanted.append(Structure.json_schema(described.json_schema))
    if (outputs := body.structured_outputs) is not None:
        given = ((kind, getattr(outputs, kind)) for kind in ("json_schema", "regex", "choice", "grammar"))
        wanted += [getattr(Structure, kind)(value) for kind, value in given if value is not None]
        wanted += [Structure.json_object()] if outputs.json_object else []
    if len(wanted) > 1:
        raise UsageError("the answer can have only one form", "give one of response_format and structured_outputs")
    return wanted[0] if wanted else None
