"""Checked reading of a checkpoint's JSON fields, and the guard against unknown ones.

Each reader returns a value of the right type and range, or raises. Every field of a file is used, known to be without
effect, or refused by its name: one that is dropped silently may change what the model computes. The tables are in
config_fields.py, generation_config.py and gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normistral.errors import CheckpointError, UsageError

DOWNLOAD_AGAIN = "download or copy the file again"
FOLLOW_LINKS = "copy the checkpoint again with its links followed (cp -rL), as one out of the hub's cache needs it"
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


Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KnownField:
    """Knowledge of one field.

    Attributes:
        reason: what it is used for, or why it is without effect.
        is_used: read by the exporter, which checks its values itself.
        accepts: whether a value (first argument) is without effect beside the other fields (second); others are
            refused. Null always is.
        values: `accepts` in words; empty where every value is without effect.
    """

    reason: str
    is_used: bool = False
    accepts: Callable[[Any, Document], bool] = lambda value, document: True
    values: str = ""


def used(reason: str) -> KnownField:
    """A field that the exporter reads."""
    return KnownField(reason, is_used=True)


def harmless(reason: str) -> KnownField:
    """A field without effect, whatever its value."""
    return KnownField(reason)


def harmless_at(*values: Any, reason: str) -> KnownField:
    """A field without effect at these values (and at null), and refused at others."""

    def accepts(value: Any, _: Document) -> bool:
        return any(type(value) is type(known) and value == known for known in _numbers(values))

    return KnownField(reason, accepts=accepts, values=", ".join(["null", *map(_as_json, values)]))


@dataclass(slots=True)
class IgnoredFields:
    """The names of `--ignore-field`; `found` are those that stood in a file."""

    names: tuple[str, ...] = ()
    found: set[str] = field(default_factory=set)

    def take_from(self, document: Document, known: Mapping[str, KnownField], file: str) -> dict[str, Any]:
        """A document less these fields; `a.b` is the field b of the object a.

        Raises:
            UsageError: one of them is read.
        """
        kept = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
        for name in self.names:
            outer, _, inner = name.partition(".")
            place = kept if name in kept else kept.get(outer)
            if not isinstance(place, dict) or (key := name if place is kept else inner) not in place:
                continue
            if place is kept and name in known and known[name].is_used:
                raise UsageError(
                    f"--ignore-field {name}: this field is read and cannot be ignored", f"correct {file}, or leave it"
                )
            del place[key]
            self.found.add(name)
        return kept

    def without(self, document: Document) -> dict[str, Any]:
        """A document less these fields, whether they may be ignored or not."""
        return {key: value for key, value in document.items() if key not in self.names}

    def require_found(self) -> None:
        """Raise UsageError for a name that is in no file: it is mistyped, or no longer needed."""
        missing = [name for name in self.names if name not in self.found]
        if missing:
            raise UsageError(f"--ignore-field {missing[0]}: the checkpoint has no such field", "leave it out")


def check_fields(document: Document, known: Mapping[str, KnownField], file: str, inside: str = "") -> None:
    """Refuse fields that may change what the model computes.

    Args:
        document: the fields, as they stand in the file.
        known: of all that may stand there.
        file: name of the file, for messages.
        inside: name of the object in the file that `document` is; empty for the whole file.

    Raises:
        CheckpointError: an unknown field, or a known one with a value that has an effect.
    """
    for name, value in document.items():
        full = f"{inside}.{name}" if inside else name
        entry = known.get(name)
        if value is None or (entry is not None and (entry.is_used or entry.accepts(value, document))):
            continue
        shown = ascii(full)[1:-1][:80]
        hint = f"if you know that it does not, export with --ignore-field {shown}"
        if entry is None:
            raise CheckpointError(
                f"{file}: the field {shown} is unknown here and may change what the model computes", hint
            )
        raise CheckpointError(
            f"{file}: {shown} is {shorten(value)}, which changes what the model computes and is not supported "
            f"({entry.reason}); without effect: {entry.values}",
            hint,
        )


def _numbers(values: tuple[Any, ...]) -> list[Any]:
    """Values with integers also as floats and back: JSON writers do not distinguish 1 from 1.0."""
    wide = [float(value) for value in values if isinstance(value, int) and not isinstance(value, bool)]
    narrow = [int(value) for value in values if isinstance(value, float) and value.is_integer()]
    return [*values, *wide, *narrow]


def _as_json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
