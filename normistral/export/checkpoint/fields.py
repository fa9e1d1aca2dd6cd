"""Checked fields of a checkpoint's JSON files: each reader gives a value of the right type and range, or an error."""

from __future__ import annotations

from typing import Any

from normistral.errors import CheckpointError

AS_PUBLISHED = "use a checkpoint whose config.json is as its authors published it"

MAX_POSITIONS = 2**26


def is_integer(value: object) -> bool:
    """Whether it is a whole number; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_integer(config: dict[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number from `low` to `high`; without a default it has to be there.

    Raises:
        CheckpointError: it is missing, of another type, or out of range.
    """
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}", AS_PUBLISHED)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(
            f"config.json: {name} must be a whole number from {low} to {high}, not {shorten(value)}", AS_PUBLISHED
        )
    return value


def read_number(config: dict[str, Any], name: str, low: float, high: float, default: float | None = None) -> float:
    """A number from `low` to `high`; errors as `read_integer`."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(
            f"config.json: {name} must be a number from {low:g} to {high:g}, not {shorten(value)}", AS_PUBLISHED
        )
    return float(value)


def read_flag(config: dict[str, Any], name: str, default: bool) -> bool:
    """True or false; errors as `read_integer`."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {shorten(value)}", AS_PUBLISHED)
    return value


def read_choice(config: dict[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    """One of several words; errors as `read_integer`."""
    value = config.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise CheckpointError(
            f"config.json: {name} must be one of {', '.join(choices)}, not {shorten(value)}", AS_PUBLISHED
        )
    return value


def read_token_id(config: dict[str, Any], name: str, vocabulary: int) -> int | None:
    """One token id or none.

    Raises:
        CheckpointError: several, or no id of the vocabulary.
    """
    if name == "pad_token_id" and is_integer(config.get(name)) and config[name] == -1:
        return None  # how the first Llama configs say "none"
    ids = read_token_ids(config, name, vocabulary, "config.json")
    if len(ids) > 1:
        raise CheckpointError(f"config.json: {name} must be one id, not {shorten(ids)}", AS_PUBLISHED)
    return ids[0] if ids else None


def read_token_ids(document: dict[str, Any], field: str, vocabulary: int, file: str) -> list[int]:
    """A field that holds one token id, several, or null.

    Raises:
        CheckpointError: anything else, or an id outside the vocabulary.
    """
    value = document.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > 64:
        raise CheckpointError(f"{file}: {field} holds {len(values)} ids", AS_PUBLISHED)
    for item in values:
        if not is_integer(item) or not 0 <= item < vocabulary:
            raise CheckpointError(
                f"{file}: {field} is {shorten(value)}, but ids run from 0 to {vocabulary - 1}", f"correct {file}"
            )
    return values


def shorten(value: object) -> str:
    """A value for a one-line message."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
