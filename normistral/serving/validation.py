"""What pydantic found wrong with a request, in one sentence that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normistral.serving.errors import ApiError

_UNKNOWN = "extra_forbidden"


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """The first error, which alternatives of a type may have caused more of; never what was sent."""
    error = next((one for one in errors if one["type"] == _UNKNOWN), errors[0])
    param = ".".join(_place(error["loc"])) or None
    if error["type"] == _UNKNOWN:
        return ApiError(400, f"unknown field {param}", "see /openapi.json", param=param, code="unknown_field")
    reason = error["msg"].removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return ApiError(400, message, param=param, code="invalid_value")


def _place(loc: Sequence[Any]) -> list[str]:
    """The path to a field, without the names that pydantic gives to alternatives of a type."""
    return [str(step) for step in loc if isinstance(step, int) or (step != "body" and str(step).isidentifier())]
