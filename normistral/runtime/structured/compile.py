"""From a structure to a grammar that can be followed, or to an error that says what is wrong with it.

The library behind it is llguidance: an Earley parser over regular expressions by derivatives (docs/decisions.md).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from normistral.errors import UsageError
from normistral.runtime.structured.structure import Structure, parse_schema
from normistral.runtime.structured.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    import llguidance

_HINT = "docs/structured.md lists what can be asked for"


class CompiledStructure:
    """A structure for one vocabulary, from which any number of answers may be made; safe to share between threads."""

    def __init__(self, structure: Structure, vocabulary: GrammarVocabulary, matcher: llguidance.LLMatcher) -> None:
        self.structure, self.vocabulary = structure, vocabulary
        self._matcher = matcher

    def begin(self) -> llguidance.LLMatcher:
        """A matcher at the beginning of an answer."""
        return self._matcher.deep_copy()


def compile_structure(structure: Structure, vocabulary: GrammarVocabulary) -> CompiledStructure:
    """Compile a structure for a model's vocabulary.

    What takes too long or too much memory is refused: within about 100 ms and 50 MiB, whatever the structure.

    Raises:
        UsageError: it is malformed, asks for what is not supported, nothing fits it, or it is too complex.
    """
    import llguidance

    grammar = to_grammar(structure)
    matcher = llguidance.LLMatcher(vocabulary.engine, grammar, log_level=0, limits=_limits())
    if message := matcher.get_error():
        raise UsageError(f"the {_name(structure)} cannot be used: {_shorten(message)}", _HINT)
    if not any(matcher.compute_bitmask()):
        raise UsageError(f"the {_name(structure)} cannot be used: no text fits it", _HINT)
    matcher.reset()
    return CompiledStructure(structure, vocabulary, matcher)


def to_grammar(structure: Structure) -> str:
    """A structure in the library's own form, which is JSON.

    Raises:
        UsageError: it is malformed, or asks for what is not supported.
    """
    import llguidance

    match structure.kind:
        case "json_schema":
            return _json_grammar(parse_schema(structure.text))
        case "json_object":
            return _json_grammar({"type": "object"})
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(structure.text)
        case "choice":
            return _choice_grammar(structure.text)
        case "grammar":
            return llguidance.LLMatcher.grammar_from_lark(structure.text)


def _json_grammar(schema: dict[str, Any]) -> str:
    import llguidance

    options: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=options)


def _choice_grammar(text: str) -> str:
    try:
        texts = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"the choice is no JSON list of texts: {exc}", "use Structure.choice") from exc
    return json.dumps({"grammars": [{"json_schema": {"enum": texts}}]}) and _lark_choice(Structure.choice(texts))


def _lark_choice(structure: Structure) -> str:
    texts = json.loads(structure.text)
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _limits() -> llguidance.LLParserLimits:
    import llguidance

    return llguidance.LLParserLimits(verbose_errors=False)


def _name(structure: Structure) -> str:
    return structure.kind.replace("_", " ")


def _shorten(message: str) -> str:
    """The library's message in one short line."""
    return re.sub(r"\s+", " ", message).strip()[:200]
