"""What pydantic found wrong with a request, in one sentence that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normistral.server.errors import ApiError

_UNKNOWN = "extra_forbidden"
_ALTERNATIVES = frozenset(("body", "str", "int", "float", "bool"))  # steps of a path that are types and no fields


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """The error that tells most; never what was sent.

    Where a field has several types there is an error for each: one about a value says more than one about its type.
    """
    error = min(errors, key=lambda one: (one["type"] != _UNKNOWN, one["type"].endswith("_type"), -len(one["loc"])))
    param = ".".join(_place(error["loc"])) or None
    if error["type"] == _UNKNOWN:
        return ApiError(400, f"unknown field {param}", "see /openapi.json", param=param, code="unknown_field")
    reason = error["msg"].removeprefix("Value error, ")
    message = f"{param}: {reason}" if param else reason
    return ApiError(400, message, param=param, code="invalid_value")


def _place(loc: Sequence[Any]) -> list[str]:
    """The path to a field, without the names that pydantic gives to alternatives of a type."""
    return [
        str(step) for step in loc if isinstance(step, int) or (step not in _ALTERNATIVES and str(step).isidentifier())
    ]
