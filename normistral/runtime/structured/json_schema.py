"""Prepares a JSON schema for the grammar library; refuses what it would get wrong or take too long for.

The library refuses keywords that it does not implement. What it gets wrong, or takes seconds or the whole stack for, is
caught here; the figures were measured with llguidance 1.9.1 (docs/decisions.md).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

from normistral.errors import UsageError
from normistral.runtime.structured.structure import DATA_KEYWORDS, filter_keywords

# How JSON is written: with one blank behind comma and colon and none elsewhere. That is what models write most readily;
# and where blanks are allowed they may go on without end. Named escapes only: "\u0061" would be another spelling of a
# key that is listed.
WRITING = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}

MOST_PARTS = 1_000  # objects of a schema; the library goes by recursion and dies of some 2,400 in each other
MOST_PATTERN_PAIRS = 600  # of patternProperties, which are compared with each other; 1,000 take 100 ms
MOST_PATTERNS_TOGETHER = 8  # that may have to hold for one text; of 12 on, time doubles with each
MOST_MULTIPLE = 10_000  # sum of multipleOf without decimal point: states of an automaton, of which a million take 6 s

_MOST_NAMES = 64  # of propertyNames; each has the schema of additionalProperties

_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_COMBINE = {"allOf", "anyOf", "oneOf", "$ref"}

# As json.dumps writes those without a name, behind an even number of backslashes; and DEL.
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01][0-9a-f]|\x7f")


_PLAIN = re.compile(r"\[(?:\\.|[^\]\\])*\]|\\[^bBk1-9]", re.DOTALL)  # classes, and escapes that mean one character
_IRREGULAR = re.compile(r"\(\?<?[=!]|\\[bBk1-9]")

# JSON Schema 2020-12, Validation, 7.3. Another name is an annotation there, which means nothing to a validator.
_FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "uri-template", "iri", "iri-reference", "uuid", "regex"),
        *("json-pointer", "relative-json-pointer"),
    )
)


def prepare_schema(schema: dict[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """The schema in the form for the library.

    Args:
        lenient: pass over keywords that cannot be kept to.

    Raises:
        UsageError: it is too large, or cannot be kept to.
    """
    schema = _as_properties(schema)
    if "x-guidance" in schema:
        raise UsageError('the schema has options of a library ("x-guidance")', "leave them out")
    if _CONTROL.search(json.dumps(schema, ensure_ascii=False)):
        raise UsageError("the schema holds control characters, which are not written", "leave them out")
    parts = sum(1 for _ in _objects(schema))
    if parts > MOST_PARTS:
        raise UsageError(f"the schema has {parts:,} parts, and may have {MOST_PARTS:,}", "leave out what is not needed")
    subschemas = list(_subschemas(schema))
    _limit_patterns(subschemas)
    _limit_multiples(subschemas)
    for part in subschemas:
        _refuse_repeatable_keys(part)
    kept = filter_keywords(schema, partial(_is_kept, lenient=lenient))
    return {**kept, "x-guidance": WRITING | ({"lenient": True} if lenient else {})}


def _as_properties(value: Any, *, is_map: bool = False) -> Any:
    """A schema without `propertyNames` and `uniqueItems` where they ask for nothing, or list all keys there may be.

    zod writes the first for a record of strings, pydantic the second for a mapping from a Literal.

    Args:
        is_map: the keys are names, not keywords.
    """
    if isinstance(value, list):
        return [_as_properties(part) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: part
        if key in DATA_KEYWORDS and not is_map
        else _as_properties(part, is_map=key in _MAPS_OF_SCHEMAS and not is_map)
        for key, part in value.items()
    }
    if is_map:
        return kept
    if kept.get("uniqueItems") is False:
        del kept["uniqueItems"]
    if kept.get("propertyNames") in ({}, True, {"type": "string"}):
        del kept["propertyNames"]
    names = _listed_names(kept)
    if names:
        del kept["propertyNames"]
        kept["properties"] = dict.fromkeys(names, kept.get("additionalProperties", True))
        kept["additionalProperties"] = False
    return kept


def _listed_names(schema: dict[str, Any]) -> list[str]:
    """All keys that an object may have, where `propertyNames` is nothing but a list and says all of them."""
    rule = schema.get("propertyNames")
    if not isinstance(rule, dict) or rule.keys() - {"enum", "type"} or rule.get("type", "string") != "string":
        return []
    names = rule.get("enum")
    if not isinstance(names, list) or len(names) > _MOST_NAMES or {"properties", "patternProperties"} & schema.keys():
        return []
    return names if all(isinstance(name, str) for name in names) else []


def _is_kept(key: str, part: Any, *, lenient: bool) -> bool:
    """All but formats of which the standard knows nothing and, where it is lenient, irregular patterns."""
    if not isinstance(part, str):
        return True
    return not ((key == "format" and part not in _FORMATS) or (key == "pattern" and lenient and _is_irregular(part)))


def _is_irregular(pattern: str) -> bool:
    """Whether a pattern (ECMA-262) looks around or back, which no automaton does; zod writes one for `email()`."""
    return _IRREGULAR.search(_PLAIN.sub("", pattern)) is not None


def _objects(value: Any) -> Iterator[dict[str, Any] | list[Any]]:
    """Every JSON object, and every list of something other than plain values."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            inner = [item for item in value if isinstance(item, dict | list)]
            if inner:
                yield value
            waiting += inner


def _subschemas(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object that may be a schema; maps of properties are among them, which does no harm."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += [inner for key, inner in value.items() if key not in DATA_KEYWORDS]
        elif isinstance(value, list):
            waiting += value


def _limit_patterns(subschemas: list[dict[str, Any]]) -> None:
    pairs = sum(
        len(patterns) ** 2 for part in subschemas if isinstance(patterns := part.get("patternProperties"), dict)
    )
    if pairs > MOST_PATTERN_PAIRS:
        raise UsageError("the schema has too many patternProperties", f"{math.isqrt(MOST_PATTERN_PAIRS)} are possible")
    patterns = [part for part in subschemas if isinstance(part.get("pattern", part.get("format")), str)]
    meet = any("allOf" in part for part in subschemas) or any(_COMBINE & part.keys() for part in patterns)
    if meet and len(patterns) > MOST_PATTERNS_TOGETHER:
        raise UsageError(
            f"the schema combines {len(patterns)} patterns and formats, and may combine {MOST_PATTERNS_TOGETHER}",
            "write what has to hold together as one pattern",
        )


def _limit_multiples(subschemas: list[dict[str, Any]]) -> None:
    """Refuse steps of many digits; such that may have to hold together count as their least common multiple."""
    steps = [Decimal(repr(step)).normalize() for part in subschemas if _is_number(step := part.get("multipleOf"))]
    digits = [int("".join(map(str, step.as_tuple().digits))) for step in steps]
    together = math.lcm(*digits) if any("allOf" in part or "$ref" in part for part in subschemas) else 1
    if max(sum(digits), together) > MOST_MULTIPLE:
        raise UsageError(
            "the schema's multipleOf has too many digits",
            f"without decimal point and zeros at the end they may add up to {MOST_MULTIPLE:,}",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_repeatable_keys(part: dict[str, Any]) -> None:
    """Refuse a number of properties that could be reached by writing one twice, which nothing forbids."""
    least, required = part.get("minProperties"), part.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
        raise UsageError(
            f"minProperties {least} cannot be kept to: nothing forbids the same key twice",
            "list the properties under properties and required",
        )
