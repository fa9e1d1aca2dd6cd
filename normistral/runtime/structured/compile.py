"""Compiles a structure to a grammar matcher, or to an error that names its fault.

The library behind it is llguidance: an Earley parser over regular expressions by derivatives (docs/decisions.md).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from normistral.errors import UsageError
from normistral.runtime.structured.json_schema import WRITING, prepare_schema
from normistral.runtime.structured.structure import Structure, parse_schema
from normistral.runtime.structured.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    import llguidance

Grammar = dict[str, Any]
"""One grammar as the library takes it: {"json_schema": ...} or {"lark_grammar": ...}."""

MOST_RULES = 1_000  # colons and brackets of a grammar; the library dies of some 2,000 rules that lead to each other
MOST_INTERSECTIONS = 8  # terminals that have to match together; of 16 on, time doubles with each
_ANSWER = "answer"  # name of the structure's grammar, for a grammar of what comes before it
_FIRST_CALL = 4  # line of the first tool's rule in `_tool_grammar`
_HINT = "docs/structured.md says what can be asked for"


class CompiledStructure:
    """A structure for one vocabulary, from which any number of answers may be made; safe to share between threads."""

    def __init__(self, structure: Structure, vocabulary: GrammarVocabulary, matcher: llguidance.LLMatcher) -> None:
        self.structure, self.vocabulary = structure, vocabulary
        self._matcher = matcher

    def begin(self) -> llguidance.LLMatcher:
        """A matcher at the beginning of an answer."""
        return self._matcher.deep_copy()

    def may_begin_with(self, text: str) -> bool:
        """Whether an answer may begin so."""
        token_ids = self.vocabulary.engine.tokenize_str(text)
        return self.begin().validate_tokens(token_ids) == len(token_ids)


def compile_structure(
    structure: Structure, vocabulary: GrammarVocabulary, grammar_prefix: str | None = None
) -> CompiledStructure:
    """Compile a structure for a model's vocabulary.

    What takes too long or too much memory is refused: within about 100 ms and 50 MiB, whatever the structure.

    Args:
        grammar_prefix: a grammar (Lark) of what comes before the answer, and of `@answer`.

    Raises:
        UsageError: it is malformed, asks for what is not supported, nothing fits it, or it is too complex.
    """
    import llguidance

    grammars = [{"name": _ANSWER, **to_grammar(structure)}]
    if grammar_prefix is not None:
        grammars.insert(0, {"lark_grammar": grammar_prefix})
    text = json.dumps({"grammars": grammars}, ensure_ascii=False)
    matcher = llguidance.LLMatcher(vocabulary.engine, text, log_level=0, limits=_limits())
    if message := matcher.get_error() or _first_trouble(matcher.deep_copy()):
        raise _refusal(structure, message)
    return CompiledStructure(structure, vocabulary, matcher)


def _first_trouble(matcher: llguidance.LLMatcher) -> str:
    """Error of the library at the first token, in its own words; "" without one."""
    certain, possible = matcher.compute_ff_tokens(), any(matcher.compute_bitmask())
    if not possible and not matcher.is_error():
        return "no text of this model's tokens fits it"
    matcher.try_consume_tokens(certain[:1])
    return matcher.get_error()


def check_structure(structure: Structure) -> None:
    """Refuse a structure that no model could follow, before one is loaded.

    Raises:
        UsageError: as `compile_structure`, but for what only a vocabulary shows.
    """
    import llguidance

    text = json.dumps({"grammars": [to_grammar(structure)]}, ensure_ascii=False)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, limits=_limits())
    if failed:
        raise _refusal(structure, messages[0])


def to_grammar(structure: Structure) -> Grammar:
    """A structure in the library's own form.

    Raises:
        UsageError: it is malformed, too large, or asks for what cannot be kept to.
    """
    import llguidance

    match structure.kind:
        case "json_schema":
            return {"json_schema": prepare_schema(parse_schema(structure.text))}
        case "json_object":
            return {"json_schema": {"type": "object", "x-guidance": WRITING}}
        case "regex":
            pattern = llguidance.regex_to_lark(structure.text, "d")  # \d is 0 to 9
            return {"lark_grammar": f"start: /{pattern}/"}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(json.dumps, _texts(structure.text)))}
        case "grammar":
            return {"lark_grammar": _prepare_grammar(structure.text)}
        case "tool_calls":
            return {"lark_grammar": _tool_grammar(json.loads(structure.text))}


def _tool_grammar(document: dict[str, Any]) -> str:
    """Grammar of an answer that is text or calls; `document` is that of `runtime.tools.tool_structure`."""
    form, more = document["format"], document["most"] - 1
    opening = [_literal(form["begin"], form["begin_id"]), _literal(form["before"])]
    closing = [_literal(form["after"]), _literal(form["end"], form["end_id"])]
    one = [*opening, "call", *closing] if form["repeated"] else ["call"]
    several = [*one, f"({' '.join([_literal(form['between']), *one])}){{0,{more}}}"] if more else one
    calls = " ".join(filter(None, several if form["repeated"] else [*opening, *several, *closing]))
    rules = [f"calls: {calls}", "call: " + " | ".join(f"call{i}" for i in range(len(document["tools"])))]
    for i, (name, schema) in enumerate(document["tools"].items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        try:
            prepared = prepare_schema(schema, lenient=name not in document["strict"])
        except UsageError as error:
            raise UsageError(f"the tool {name} cannot be used: {error.message}", error.hint) from None
        rules.append(f'call{i}: {head} %json {json.dumps(prepared, ensure_ascii=False)} "}}"')
    start = "start: calls"
    if document["text"] is True:
        start = "start: TEXT? | calls"
        other = "[^<\\s](.|\\n)*" if document["thinking"] else _text_without("" if form["begin_id"] else form["begin"])
        rules.append(f"TEXT: /{other}/")
    elif document["text"] is not None:
        start = "start: text | calls"
        rules.append(f"text: %json {json.dumps(prepare_schema(document['text']), ensure_ascii=False)}")
    return "\n".join([start, *rules])


def _literal(text: str, token_id: int | None = None) -> str:
    if not text:
        return ""
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _text_without(begin: str) -> str:
    """Regular expression of texts that do not begin with `begin`; a beginning of it alone is one."""
    if not begin:
        return "(.|\\n)+"
    parts = [re.escape(character).replace("/", "\\/") for character in begin]
    other = "|".join("".join(parts[:i]) + f"[^{parts[i]}]" for i in range(len(parts)))
    beginnings = "|".join("".join(parts[:i]) for i in range(1, len(parts)))
    return f"({other})(.|\\n)*|{beginnings}"


def _texts(text: str) -> list[str]:
    try:
        texts = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"the choice is no JSON list of texts: {exc}", "make it with Structure.choice") from exc
    return list(json.loads(Structure.choice(texts).text))


def _prepare_grammar(text: str) -> str:
    """A grammar with its JSON schemas prepared; parts that the library would ignore are refused."""
    if sum(map(text.count, ":([{")) > MOST_RULES:
        raise UsageError(f"the grammar has more than {MOST_RULES:,} rules and brackets", "write a shorter one")
    if text.count("&") > MOST_INTERSECTIONS:
        raise UsageError(
            f"the grammar has more than {MOST_INTERSECTIONS} &", "write what has to match as one expression"
        )
    if re.search(r"^\s*[?!]?[\w-]+\[[^\]\n]*\btemperature\b", text, re.MULTILINE):
        raise UsageError("a grammar cannot set the temperature here", "set it for the whole answer")
    pieces, end = [], 0
    for found in re.finditer(r"%json\s*(?=\{)", text):
        if found.start() < end:
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError as exc:
            raise UsageError(f"a schema in the grammar is not JSON: {exc}", "mend it") from exc
        pieces += [text[end : found.end()], json.dumps(prepare_schema(schema), ensure_ascii=False)]
        end = after
    return "".join([*pieces, text[end:]])


def _limits() -> llguidance.LLParserLimits:
    """A tenth of the library's own, or less: those allow for seconds and hundreds of megabytes."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=100_000,
        max_lexer_states=25_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _refusal(structure: Structure, message: str) -> UsageError:
    """The library's message in one short line, without the picture of the place that it draws."""
    what = structure.kind.replace("_", " ")
    if structure.kind == "tool_calls" and (place := re.match(r"at (\d+)\(", message)):
        tools = dict(enumerate(json.loads(structure.text)["tools"], _FIRST_CALL))
        what = f"tool {tools[line]}" if (line := int(place[1])) in tools else what
    picture = re.search(r"\n\s*\d+ \|", message)
    short = message[: picture.start()] if picture is not None else message
    if "error: " in short:  # of the parser of regular expressions, which draws one too
        short = short.rpartition("error: ")[2]
    short = re.sub(r"\s+", " ", short.replace("<non-verbose/>", "")).strip()
    short = re.sub(r'^at \d+\(\d+\): invalid regex ".*" \(in regex\): ', "", short)
    short = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", short)
    short = re.sub(r"^Unimplemented keys: \[(.*)\]$", r"not supported: \1", short)
    if short.startswith("NoExtensionBias"):
        short = "no text fits it"
    return UsageError(f"the {what} cannot be used: {short[:200]}", _HINT)
