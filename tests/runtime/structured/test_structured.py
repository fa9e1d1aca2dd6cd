"""Structured output: whatever a model would say, what it writes is of the structure, or marked as cut off."""

import json
import re
import time
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processor_speed import within
from scripted_models import END_OF_TURN, TAG_TEXTS, TAG_TOKENS, make_model
from text_models import BACKENDS, wrap
from tiny_models import THINKING_VOCABULARY, VOCABULARY

import normistral
from normistral.errors import UsageError
from normistral.runtime.detokenizer import StreamDetokenizer, spell_vocabulary
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.options import GenerationConfig
from normistral.runtime.structured.compile import CompiledStructure, check_structure, compile_structure
from normistral.runtime.structured.constraint import Constraint
from normistral.runtime.structured.structure import MOST_BYTES, MOST_NESTING, Structure
from normistral.runtime.structured.vocabulary import GrammarVocabulary

PERSON = {
    "type": "object",
    "properties": {
        "navn": {"type": "string", "maxLength": 12},
        "alder": {"type": "integer", "minimum": 0, "maximum": 120},
        "fylke": {"enum": ["Møre og Romsdal", "Trøndelag"]},
    },
    "required": ["navn", "alder", "fylke"],
    "additionalProperties": False,
}
PADDED = 7  # logits behind the tokenizer's tokens


def vocabulary_of(kind: str) -> GrammarVocabulary:
    tokenizer = wrap(BACKENDS[kind]())
    return GrammarVocabulary(tokenizer, tokenizer.vocabulary_size + PADDED, [tokenizer.special_tokens["<|im_end|>"]])


VOCABULARIES = {kind: vocabulary_of(kind) for kind in BACKENDS}


def write(compiled: CompiledStructure, random: np.random.Generator, most: int = 300) -> tuple[str, bool]:
    """A text by random allowed tokens; and whether it came to an end."""
    vocabulary = compiled.vocabulary
    constraint = Constraint(compiled)
    detokenizer = StreamDetokenizer(vocabulary.tokenizer, vocabulary.tokenizer.encode("Svar:"))
    text = ""
    for _ in range(most):
        token_ids = np.flatnonzero(constraint.allowed_mask())
        token_id = int(random.choice(token_ids))
        assert token_id < vocabulary.tokenizer.vocabulary_size, "a token that there is not"
        if token_id in vocabulary.stop_token_ids:
            return text + detokenizer.flush(), True
        constraint.commit(token_id)
        text += detokenizer.push(token_id)
        if constraint.complete:
            return text + detokenizer.flush(), True
    return text, False


def can_write(compiled: CompiledStructure, text: str) -> bool:
    constraint = Constraint(compiled)
    for token_id in compiled.vocabulary.tokenizer.encode(text, add_special_tokens=False):
        if not constraint.count_accepted([token_id]):
            return False
        constraint.commit(token_id)
    return constraint.complete or bool(constraint.allowed_mask()[list(compiled.vocabulary.stop_token_ids)].all())


# What is written is of the structure


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_text_is_of_its_structure_in_every_kind_of_vocabulary(kind):
    random = np.random.default_rng(1)
    schema = compile_structure(Structure.json_schema(PERSON), VOCABULARIES[kind])
    regex = compile_structure(Structure.regex(r"[a-zæøå ]{3,9}\.|\d{4}/\d\d"), VOCABULARIES[kind])
    texts = ["ja", "nei", "<|im_end|>", 'blåbær "på"\n brødskive', "ja takk"]
    choice = compile_structure(Structure.choice(texts), VOCABULARIES[kind])
    grammar = compile_structure(Structure.grammar('start: "(" start ")" | /[æøå]/ '), VOCABULARIES[kind])
    for _ in range(8):
        person, ended = write(schema, random)
        assert ended
        jsonschema.validate(json.loads(person), PERSON)
        assert re.fullmatch(r"[a-zæøå ]{3,9}\.|\d{4}/\d\d", write(regex, random)[0])
        assert write(choice, random)[0] in texts
        nested, ended = write(grammar, random)
        assert not ended or re.fullmatch(r"(\(*)[æøå](\)*)", nested)
        assert not ended or nested.count("(") == nested.count(")")


def leaves() -> st.SearchStrategy:
    texts = st.text(st.sampled_from('aåæø "\\\n{'), max_size=4)
    bounds = st.tuples(st.integers(-1000, 1000), st.integers(0, 1000))
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"format": "date", "type": "string"}]),
        st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
            lambda size: {"type": "string", "minLength": size[0], "maxLength": sum(size)}
        ),
        bounds.map(lambda at: {"type": "integer", "minimum": at[0], "maximum": sum(at)}),
        bounds.map(lambda at: {"type": "number", "exclusiveMinimum": at[0], "maximum": sum(at) + 1}),
        st.integers(1, 99).map(lambda step: {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 999}),
        st.sampled_from(["^[a-zæøå]{2,5}$", "^(ja|nei)$", "^\\d{1,3}$"]).map(
            lambda p: {"type": "string", "pattern": p}
        ),
        st.lists(st.one_of(texts, st.integers(-9, 9), st.none()), min_size=1, max_size=3).map(lambda of: {"enum": of}),
        st.recursive(texts, lambda inner: st.lists(inner, max_size=2)).map(lambda value: {"const": value}),
    )


def branches(inner: st.SearchStrategy) -> st.SearchStrategy:
    keys = st.text(st.sampled_from('abcåø" '), min_size=1, max_size=3)
    properties = st.dictionaries(keys, st.tuples(inner, st.booleans()), max_size=3)
    return st.one_of(
        st.tuples(properties, st.one_of(st.just(False), inner)).map(
            lambda made: {
                "type": "object",
                "properties": {key: schema for key, (schema, _) in made[0].items()},
                "required": [key for key, (_, required) in made[0].items() if required],
                "additionalProperties": made[1],
            }
        ),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda made: {"type": "array", "items": made[0], "minItems": made[1], "maxItems": made[1] + made[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of}),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda of: {"type": "array", "prefixItems": of, "items": False, "minItems": len(of)}
        ),
    )


@given(st.recursive(leaves(), branches, max_leaves=5), st.integers(0, 2**32))
def test_what_is_written_for_any_schema_is_valid(schema, seed):
    schema = {"$defs": {"x": schema}, "type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "maxItems": 2}
    try:
        compiled = compile_structure(Structure.json_schema(schema), VOCABULARIES["byte-level"])
    except UsageError:  # a bound that no value meets
        return
    text, ended = write(compiled, np.random.default_rng(seed))
    if ended:
        jsonschema.validate(json.loads(text), schema)


def test_any_object_is_written_with_one_blank_behind_comma_and_colon():
    compiled = compile_structure(Structure.json_object(), VOCABULARIES["byte-level"])
    random = np.random.default_rng(3)
    written = [text for text, ended in (write(compiled, random, 60) for _ in range(200)) if ended]
    assert written
    assert all(json.dumps(json.loads(text), ensure_ascii=False) for text in written)
    assert all(isinstance(json.loads(text), dict) for text in written)
    assert not any(re.search(r"\s[{}\[\]:,]|[{\[]\s", re.sub(r'"(\\.|[^"\\])*"', "", text)) for text in written)


def test_a_vocabulary_without_stop_tokens_writes_what_ends_by_itself():
    tokenizer = wrap(BACKENDS["byte-level"]())
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocabulary_size, [])
    compiled = compile_structure(Structure.choice(["blåbær"]), vocabulary)
    assert write(compiled, np.random.default_rng(1)) == ("blåbær", True)


# In the decode loop


def eager_to_stop(token_ids):
    """A model that would rather say nothing at all."""
    logits = random_logits(VOCABULARY)(token_ids)
    logits[END_OF_TURN] = 50.0
    return logits


STRUCTURES = {
    "schema": Structure.json_schema(PERSON),
    "regex": Structure.regex("[æøå]{3}(ja|nei)"),
    "choice": Structure.choice(["Blåbær", "Ærfugl"]),
}


def is_of(structure: Structure, text: str) -> bool:
    match structure.kind:
        case "json_schema":
            jsonschema.validate(json.loads(text), json.loads(structure.text))
            return True
        case "regex":
            return re.fullmatch(structure.text, text) is not None
        case _:
            return text in json.loads(structure.text)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "seed": 5},
        {"temperature": 1.0, "seed": 1, "draft": "off"},
        {"temperature": 0.8, "top_k": 3, "top_p": 0.5, "min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_answers_end_with_stop_and_are_of_the_structure(tmp_path, name, options):
    structure = STRUCTURES[name]
    for script in (random_logits(VOCABULARY), eager_to_stop):
        with make_model(tmp_path / script.__name__, script) as model:
            completion = model.generate("Svar:", structure=structure, **options)
            assert completion.finish_reason == "stop"
            assert is_of(structure, completion.text)
            answer = model.chat().send("Hei", structure=structure, **options)
            assert answer.finish_reason == "stop"
            assert is_of(structure, answer.text)
            prefix = model.prefill("Svar: ")
            assert is_of(structure, prefix.generate("nå", structure=structure, **options).text)


def test_what_is_cut_off_says_so(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        assert model.generate("Svar:", structure=STRUCTURES["schema"], max_new_tokens=5).finish_reason == "length"
    with make_model(tmp_path, random_logits(VOCABULARY), context_length=12) as model:
        assert model.generate("Svar:", structure=STRUCTURES["schema"]).finish_reason == "context"


def test_an_answer_that_is_whole_with_its_last_token_is_not_cut_off(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        whole = model.generate("Svar:", structure=STRUCTURES["choice"])
        tokens = len(whole.token_ids)
        again = model.generate("Svar:", structure=STRUCTURES["choice"], max_new_tokens=tokens)
        assert (again.text, again.finish_reason) == (whole.text, "stop")
        shorter = model.generate("Svar:", structure=STRUCTURES["choice"], max_new_tokens=tokens - 1)
        assert shorter.finish_reason == "length"


def test_a_stop_token_comes_only_where_the_answer_may_end(tmp_path):
    with make_model(tmp_path, eager_to_stop) as model:
        assert model.generate("Svar:", structure=Structure.regex("å{2,9}")).text == "åå"


def test_what_is_certain_is_fed_in_one_step_and_changes_nothing(tmp_path):
    structure = Structure.json_schema({"type": "object", "properties": {"hovedstad": {"const": "Ærøy og Tromsø"}},
                                       "required": ["hovedstad"], "additionalProperties": False})  # fmt: skip
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        steps = model._backend.forwarded
        written = {}
        for draft in ("off", "auto"):
            del steps[:]
            completion = model.generate("Svar:", structure=structure, draft=draft)
            written[draft] = completion.text
            assert len(steps) < len(completion.token_ids) / 2
        assert written["off"] == written["auto"] == '{"hovedstad": "Ærøy og Tromsø"}'
        control = Structure.choice(["Ærøy <|im_end|> </s>"])  # as ordinary text, not as the control tokens
        completion = model.generate("Svar:", structure=control)
        assert completion.text == "Ærøy <|im_end|> </s>"
        assert END_OF_TURN not in completion.token_ids


def test_drafts_are_cut_to_what_may_follow(tmp_path):
    """A prompt that repeats itself is drafted from; what is written stays of the structure, and the same."""
    structure = Structure.regex("(ja takk, ja takk, ){9}nei")
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        model._step_costs.choose = lambda rates, context: min(3, len(rates))  # drafting pays
        prompt = "ja takk, ja takk, nei takk, " * 4
        drafted = model.generate(prompt, structure=structure)
        plain = model.generate(prompt, structure=structure, draft="off")
        assert drafted.text == plain.text == "ja takk, ja takk, " * 9 + "nei"
        free = model.generate(prompt, structure=Structure.regex("[a-z ,]{60}"))
        assert free.timings.drafted_tokens > 0
        assert free.text == model.generate(prompt, structure=Structure.regex("[a-z ,]{60}"), draft="off").text


def test_logprobs_are_those_of_the_bare_model(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        chunks = list(model.stream("Svar:", structure=STRUCTURES["choice"], logprobs=1))
        first = next(chunk for chunk in chunks if chunk.token_id is not None)
        assert first.top_logprobs[0][0] != first.token_id  # the likeliest was not allowed
        assert first.logprob < first.top_logprobs[0][1] < 0


def test_the_same_seed_gives_the_same_answer(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        texts = {
            model.generate("Svar:", structure=STRUCTURES["schema"], temperature=1.5, seed=s).text for s in [7, 7, 8]
        }
        assert len(texts) == 2


def test_cancelling_ends_it_as_ever(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        chunks = model.stream("Svar:", structure=Structure.regex("[a-z]{80,90}"))
        next(chunks)
        model.cancel()
        assert list(chunks)[-1].finish_reason == "cancelled"


def test_a_stop_text_ends_an_answer_only_where_it_is_whole(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        person = model.generate("Svar:", structure=STRUCTURES["schema"], stop=[" ", ",", '"'])
        assert is_of(STRUCTURES["schema"], person.text)
        assert person.finish_reason == "stop"
        whole = model.generate("Svar:", structure=Structure.regex("(ja,){20}nei"))
        assert whole.text == "ja," * 20 + "nei"
        early = model.generate("Svar:", structure=Structure.regex("((ja,){4})+nei|(ja,)*ja"), stop=[","])
        assert early.text == "ja"


def test_a_structure_without_a_way_on_is_an_error_and_no_answer(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model:
        with pytest.raises(UsageError, match="no token of this model"):
            model.generate("Svar:", structure=Structure.grammar('start: <|im_end|> "a"'))
        assert model.generate("Svar:", structure=STRUCTURES["choice"]).finish_reason == "stop"


def test_going_on_behind_the_end_is_refused(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY)) as model, pytest.raises(UsageError, match="ignore_eos"):
        model.generate("Svar:", structure=STRUCTURES["choice"], ignore_eos=True)


# Behind reasoning


@pytest.mark.parametrize("markers", [TAG_TOKENS, TAG_TEXTS], ids=["tokens", "texts"])
@pytest.mark.parametrize("most", [None, 0, 3])
def test_the_structure_begins_when_the_reasoning_is_closed(tmp_path, markers, most):
    for seed in range(6):
        vocabulary = THINKING_VOCABULARY if markers is TAG_TOKENS else VOCABULARY

        def reasons(token_ids, vocabulary=vocabulary, seed=seed):
            logits = random_logits(vocabulary, seed)(token_ids)
            if markers is TAG_TOKENS:
                logits[[markers.open_id, markers.close_id]] += 6.0
            return logits

        with make_model(tmp_path / str(seed), reasons, reasoning=markers) as model:
            options = {"temperature": 1.0, "seed": seed, "max_reasoning_tokens": most}
            answer = model.chat().send("Hei", structure=STRUCTURES["schema"], **options)
            assert answer.finish_reason == "stop" or answer.reasoning_open
            if answer.finish_reason == "stop":
                assert not answer.reasoning_open
                assert is_of(STRUCTURES["schema"], answer.text)
            if most is not None:
                assert answer.finish_reason == "stop"


def test_reasoning_is_told_from_the_answer(tmp_path):
    """The model wants to reason and then to answer in prose: the first it may."""
    for markers in (TAG_TOKENS, TAG_TEXTS):
        script = ["<think>Å, tja.</think>\n\nDet er ja."]
        with make_model(tmp_path / str(markers.open_id), script, reasoning=markers) as model:
            answer = model.chat().send("Hei", structure=Structure.choice(["nei", "kanskje"]))
            assert answer.reasoning == "Å, tja."
            assert answer.text in ("nei", "kanskje")


def test_an_answer_that_could_not_be_told_from_blanks_is_refused(tmp_path):
    with make_model(tmp_path, random_logits(VOCABULARY), reasoning=TAG_TEXTS) as model:
        for pattern in (" ?ja", "(?s).*"):
            with pytest.raises(UsageError, match="behind reasoning"):
                model.generate("Hei", structure=Structure.regex(pattern))


@pytest.mark.parametrize(
    ("schema", "fits", "not_fits"),
    [
        ({"propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}, '{"x": 1}', '{"x": "y"}'),
        ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}}, '{"a": 1}', '{"c": 1}'),
        ({"propertyNames": {"enum": ["a"]}, "required": ["a"]}, '{"a": "x"}', "{}"),
        ({"properties": {"l": {"type": "array", "uniqueItems": False}}, "required": ["l"]}, '{"l": [1, 1]}', "{}"),
        # Names of properties, not keywords
        (
            {
                "properties": {"propertyNames": {"type": "string"}, "uniqueItems": False, "properties": {"enum": [5]}},
                "required": ["propertyNames", "properties"],
                "additionalProperties": False,
            },
            '{"propertyNames": "x", "properties": 5}',
            '{"propertyNames": "x", "properties": 6}',
        ),
    ],
)
def test_keywords_that_ask_for_nothing_or_list_all_keys(schema, fits, not_fits):
    """As zod writes a record, and pydantic a mapping whose keys are a Literal."""
    compiled = compile_structure(Structure.json_schema({"type": "object"} | schema), VOCABULARIES["byte-level"])
    assert can_write(compiled, fits)
    assert not can_write(compiled, not_fits)
    jsonschema.validate(json.loads(fits), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(not_fits), schema)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Structure.json_schema("{"), "not JSON"),
        (lambda: Structure.json_schema("[]"), "is a JSON object"),
        (lambda: Structure.json_schema(int), "no pydantic model"),
        (lambda: Structure.json_schema({"const": {1, 2}}), "cannot be written as JSON"),
        (lambda: Structure.json_schema({"const": float("nan")}), "cannot be written as JSON"),
        (lambda: Structure.json_schema({"type": "strng"}), "Invalid type: strng"),
        (lambda: Structure.json_schema({"type": "array", "uniqueItems": True}), 'not supported: "uniqueItems"'),
        (lambda: Structure.json_schema({"propertyNames": {"pattern": "a"}}), 'not supported: "propertyNames"'),
        (
            lambda: Structure.json_schema({"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}}),
            'not supported: "propertyNames"',
        ),
        (lambda: Structure.json_schema({"not": {}, "if": {}}), 'not supported: "if", "not"'),
        (lambda: Structure.json_schema({"type": "string", "format": "regex"}), "Unknown format: regex"),
        (lambda: Structure.json_schema({"properties": {"format": {"format": "iri"}}}), "Unknown format: iri"),
        (lambda: Structure.json_schema({"$ref": "https://example.org/x"}), "not present in a registry"),
        (lambda: Structure.json_schema({"$ref": "#/nei"}), "'/nei' does not exist"),
        (lambda: Structure.json_schema({"$ref": "#"}), "no text fits it"),
        (lambda: Structure.json_schema({"enum": []}), "anyOf is empty"),
        (lambda: Structure.json_schema({"type": "object", "minProperties": 2}), "minProperties 2"),
        (lambda: Structure.json_schema({"x-guidance": {"lenient": True}}), "x-guidance"),
        (lambda: Structure.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (lambda: Structure.json_schema({"const": "a\x0bb"}), "control characters"),
        (lambda: Structure.json_schema({"const": "a\\\x1f"}), "control characters"),
        (lambda: Structure.json_schema({"enum": ["\x7f"]}), "control characters"),
        (lambda: Structure.regex("(a"), "unclosed group"),
        (lambda: Structure.regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: Structure.regex(""), "the regex is empty"),
        (lambda: Structure.regex("\ud800"), "half a character"),
        (lambda: Structure.regex("[^\x00-\U0010ffff]"), "no text fits it"),
        (lambda: Structure.choice([]), "not empty"),
        (lambda: Structure.choice(["a", ""]), "not empty"),
        (lambda: Structure.choice("ja"), "several texts"),
        (lambda: Structure.choice(5), "several texts"),
        (lambda: Structure.choice([["ja"]]), "not empty"),
        (lambda: Structure("choice", "ja"), "no JSON list"),
        (lambda: Structure("choice", "[1]"), "not empty"),
        (lambda: Structure("xml", "a"), "no structure 'xml'"),
        (lambda: Structure("json_object", "a"), "takes no text"),
        (lambda: Structure.grammar("start: start"), "no text fits it"),
        (lambda: Structure.grammar("start: nei"), 'unknown name: "nei"'),
        (lambda: Structure.grammar('begin: "a"'), "no start rule"),
        (lambda: Structure.grammar('start[temperature=0.5]: "a"'), "temperature"),
        (lambda: Structure.grammar("start: %json {"), "not JSON"),
        (lambda: Structure.grammar('start: %json {"multipleOf": 999983}'), "multipleOf"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_with_a_hint(make, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        compile_structure(make(), VOCABULARIES["byte-level"])
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE = {
    "long": lambda: Structure.regex("a" * (MOST_BYTES + 1)),
    "deep schema": lambda: Structure.json_schema(nested(5000)),
    "deep regex": lambda: Structure.regex("(" * 5000 + ")" * 5000),
    "wide": lambda: Structure.json_schema({"properties": {f"k{i}": {"type": "string"} for i in range(1500)}}),
    "chain of references": lambda: Structure.json_schema(
        {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}, "$ref": "#/$defs/d0"}
    ),
    "chain of rules": lambda: Structure.grammar("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000))),
    "steps": lambda: Structure.json_schema({"type": "integer", "multipleOf": 999983}),
    "steps together": lambda: Structure.json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
    "patterns together": lambda: Structure.json_schema(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*[{'ab'[i % 2]}](a|b){{{i + 12}}}"} for i in range(16)]}
    ),
    "intersections": lambda: Structure.grammar("start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(20))),
    "patterns": lambda: Structure.json_schema({"patternProperties": {f"^k{i}$": {} for i in range(300)}}),
    "repetition": lambda: Structure.regex("a{1000000000}"),
    "terminals": lambda: Structure.grammar(
        "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(25)) + '\nT25: "a"'
    ),
    "rules": lambda: Structure.grammar(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(25)) + '\nr25: "a"'
    ),
    "alternatives": lambda: Structure.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(9)]}
    ),
    "intersection": lambda: Structure.grammar("start: T\nT: /.*a.{30}/ & /.*b.{33}/ & ~/.*c.{28}/"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_long_is_refused_quickly(name):
    """Processor time, so that a busy machine is no failure; three times the 100 ms that a quiet one stays under."""
    vocabulary = VOCABULARIES["byte-level"]
    assert vocabulary.engine
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before, start = memory_kib("VmRSS"), time.process_time()
    with pytest.raises(UsageError):
        compile_structure(HOSTILE[name](), vocabulary)
    assert within(time.process_time() - start, 0.3)
    assert memory_kib("VmHWM") - before < 50 * 1024


def memory_kib(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def test_catastrophic_expressions_are_followed_in_linear_time():
    compiled = compile_structure(Structure.regex("(a|a)*(a+)+(b|c)"), VOCABULARIES["byte-level"])
    constraint = Constraint(compiled)
    start = time.process_time()
    for _ in range(200):
        constraint.commit(VOCABULARIES["byte-level"].tokenizer.token_id("a"))
        constraint.allowed_mask()
    assert within(time.process_time() - start, 1.0)


def test_a_structure_can_be_checked_before_a_model_is_loaded():
    check_structure(Structure.json_schema(PERSON))
    check_structure(Structure.regex("[æøå]+"))
    with pytest.raises(UsageError, match="unclosed group"):
        check_structure(Structure.regex("(a"))


# The plain data


def test_structures_travel_as_json():
    for structure in (*STRUCTURES.values(), Structure.json_object()):
        config = GenerationConfig(structure=structure, stop=("å",))
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=GenerationConfig) == config
        assert hash(config.structure) == hash(structure)
    assert normistral.Structure is Structure


def test_a_schema_may_be_a_mapping_a_text_or_a_pydantic_model():
    from pydantic import BaseModel

    class Person(BaseModel):
        navn: str
        alder: int | None = None

    assert Structure.json_schema(PERSON) == Structure.json_schema(Structure.json_schema(PERSON).text)
    compiled = compile_structure(Structure.json_schema(Person), VOCABULARIES["byte-level"])
    text, ended = write(compiled, np.random.default_rng(2))
    assert not ended or Person.model_validate_json(text)
    assert not can_write(compiled, '{"navn": "å", "alder": 3, "mer": 1}')
    assert can_write(compiled, '{"navn": "å", "alder": 3}')

    class Open(BaseModel, extra="allow"):
        navn: str

    assert can_write(compile_structure(Structure.json_schema(Open), compiled.vocabulary), '{"navn": "å", "mer": 1}')


def test_no_second_spelling_of_a_key_gets_past_its_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    compiled = compile_structure(Structure.json_schema(schema), VOCABULARIES["byte-level"])
    assert can_write(compiled, '{"a": 1, "b": "x"}')
    assert not can_write(compiled, '{"\\u0061": "x"}')
    assert not can_write(compiled, '{"a": 1, "a": "x"}')


def test_named_control_characters_and_backslashes_are_written():
    schema = {"enum": ['\b\f\n\r\t\\u0001"/']}
    compiled = compile_structure(Structure.json_schema(schema), VOCABULARIES["byte-level"])
    assert json.loads(write(compiled, np.random.default_rng(1))[0]) == schema["enum"][0]


def test_choices_keep_their_order_once():
    assert Structure.choice(["b", "a", "b"]).text == '["b", "a"]'


def test_nesting_and_size_have_bounds():
    Structure.json_schema(nested(MOST_NESTING - 1))
    with pytest.raises(UsageError, match=f"nested more than {MOST_NESTING}"):
        Structure.json_schema(nested(MOST_NESTING + 1))
    with pytest.raises(UsageError, match="65,537 bytes"):
        Structure.regex("a" * (MOST_BYTES + 1))


# Tokens as bytes


@pytest.mark.parametrize("kind", BACKENDS)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12))
def test_the_bytes_of_tokens_are_those_of_the_text_that_is_shown(kind, text):
    tokenizer = wrap(BACKENDS[kind]())
    spelled = spell_vocabulary(tokenizer, tokenizer.vocabulary_size)
    prompt = tokenizer.encode("Svar: ja")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if any(tokenizer.is_special(token_id) for token_id in token_ids):
        return  # what the vocabulary cannot spell
    detokenizer = StreamDetokenizer(tokenizer, prompt)
    shown = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
    assert b"".join(spelled[token_id] for token_id in token_ids).decode() == shown


# The document


def test_what_the_document_shows_can_be_compiled():
    text = (Path(__file__).parents[3] / "docs" / "structured.md").read_text(encoding="utf-8")
    schema = re.search(r"^(\{\n.*?\n\})$", text, re.DOTALL | re.MULTILINE)[1]
    compiled = compile_structure(Structure.json_schema(schema), VOCABULARIES["byte-level"])
    shown = re.findall(r'^(\{"name".*\})$', text, re.MULTILINE)
    assert shown
    assert all(can_write(compiled, answer) for answer in shown)
    (pattern,) = re.findall(r"--regex '(.*?)'", text)
    assert can_write(compile_structure(Structure.regex(pattern), VOCABULARIES["byte-level"]), "22 January 1904")
    for name in re.findall(r"Structure\.(\w+)\(", text):
        assert callable(getattr(Structure, name))
