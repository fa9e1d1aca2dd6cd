"""Form of an answer as plain data: made by the caller, passed between processes, compiled in compile.py.

It knows neither models nor the grammar library; nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from normistral.errors import UsageError

StructureKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "tool_calls"]

MOST_BYTES = 64 * 1024  # of a structure's text
DATA_KEYWORDS = ("enum", "const", "default", "examples")  # of a JSON schema: what they hold is no schema
_DOCUMENTATION = frozenset(("title", "description", "$comment"))
MOST_NESTING = 64  # brackets within brackets; libraries that parse by recursion may crash far beyond


@dataclass(frozen=True, slots=True)
class Structure:
    """The form of an answer; make it with the class methods, which check what they are given.

    Attributes:
        kind: what `text` is.
        text: a JSON schema, a regular expression, a JSON list of texts, or a grammar; empty for `json_object`. Of
            tool_calls what `runtime.tools.tool_structure` writes.
    """

    kind: StructureKind
    text: str = ""

    def __post_init__(self) -> None:
        """Raises UsageError for an unknown kind, or a text that is none, too long, or nested too deeply."""
        if self.kind not in get_args(StructureKind):
            raise UsageError(f"no structure {self.kind!r}", f"kinds are: {', '.join(get_args(StructureKind))}")
        what = self.kind.replace("_", " ")
        if not isinstance(self.text, str):
            raise UsageError(f"a {what} is given as text, not as {type(self.text).__name__}")
        if (self.kind == "json_object") != (self.text == ""):
            raise UsageError("any JSON object takes no text" if self.text else f"the {what} is empty", "see its help")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as exc:
            raise UsageError(f"the {what} holds half a character at position {exc.start}", "write it as UTF-8") from exc
        if size > MOST_BYTES:
            raise UsageError(
                f"the {what} has {size:,} bytes, and may have {MOST_BYTES:,}", "leave out what need not be checked"
            )
        if _nesting(self.text) > MOST_NESTING:
            raise UsageError(f"the {what} is nested more than {MOST_NESTING} deep", "write it flatter")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | type) -> Structure:
        """JSON that fits a schema.

        Args:
            schema: as a mapping or JSON text (JSON Schema 2020-12), or a pydantic model; that gets no fields but its
                own, unless it says what becomes of others.

        Raises:
            UsageError: it is no JSON object, or too large.
        """
        if isinstance(schema, type):
            make_schema = getattr(schema, "model_json_schema", None)
            if make_schema is None:
                raise UsageError(f"{schema.__name__} is no pydantic model", "give a pydantic model or a JSON schema")
            schema = close_objects(make_schema())
        if isinstance(schema, Mapping):
            try:
                schema = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            except (TypeError, ValueError, RecursionError) as exc:
                raise UsageError(f"the schema cannot be written as JSON: {exc}", "use texts, numbers, lists") from exc
        assert not isinstance(schema, type)
        structure = cls("json_schema", schema)  # first of all its size and nesting
        parse_schema(structure.text)
        return structure

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """A text that the whole pattern matches.

        The syntax is that of Rust's `regex`: no look-around, no references, \\d is 0 to 9.
        """
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Structure:
        """One of these texts.

        Raises:
            UsageError: there are none, or one is empty or no text.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise UsageError("a choice is between several texts", "give a list")
        chosen = list(texts)
        if not chosen or not all(isinstance(text, str) and text for text in chosen):
            raise UsageError("a choice needs texts that are not empty", "give at least one")
        return cls("choice", json.dumps(list(dict.fromkeys(chosen)), ensure_ascii=False))

    @classmethod
    def grammar(cls, lark: str) -> Structure:
        """A text of a context-free grammar, in llguidance's dialect of Lark; it begins with the rule `start`."""
        return cls("grammar", lark)


def close_objects(schema: Any) -> Any:
    """A schema whose objects have only the properties that it lists or requires, where it says nothing of others."""
    if isinstance(schema, list):
        return [close_objects(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: part if key in DATA_KEYWORDS else close_objects(part) for key, part in schema.items()}
    properties, required = closed.get("properties"), closed.get("required")
    if closed.get("type") == "object" and isinstance(properties, dict) and "additionalProperties" not in closed:
        if isinstance(required, list):
            others = [name for name in required if isinstance(name, str) and name not in properties]
            closed["properties"] = properties | dict.fromkeys(others, True)
        closed["additionalProperties"] = False
    return closed


def filter_keywords(schema: Any, keep: Callable[[str, Any], bool]) -> Any:
    """A schema with only those keywords, at any depth, for which `keep` says so, given each with its value."""
    if isinstance(schema, list):
        return [filter_keywords(part, keep) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: part if key in DATA_KEYWORDS else filter_keywords(part, keep)
        for key, part in schema.items()
        if keep(key, part)
    }


def without_documentation(schema: Any) -> Any:
    """A schema without the texts that describe it, of which a grammar has no use."""
    # A property of that name has a schema.
    return filter_keywords(schema, lambda key, part: key not in _DOCUMENTATION or not isinstance(part, str))


def without_nulls(schema: Any) -> Any:
    """A schema without keywords that are null, which no keyword may be: Go writes an empty list so, others no value."""
    return filter_keywords(schema, lambda key, part: part is not None or key in ("const", "default"))


def parse_schema(text: str) -> dict[str, Any]:
    """Parse a JSON schema.

    Raises:
        UsageError: it is not JSON, or no JSON object.
    """
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as exc:
        raise UsageError(
            f"the schema is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}", "mend it there"
        ) from exc
    except (RecursionError, ValueError) as exc:
        raise UsageError(f"the schema is not JSON: {exc}", "mend it") from exc
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema is a JSON object", 'such as {"type": "object", "properties": {...}}')
    kept: dict[str, Any] = without_nulls(schema)
    return kept


def _nesting(text: str) -> int:
    """How deep brackets go, wherever they stand: a bound, because those in quotes nest nothing."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}" and depth:
            depth -= 1
    return deepest
