"""Structured output: whatever a model would say, what it writes is of the structure, or marked as cut off."""

import json
import re

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_models import END_OF_TURN, TAG_TEXTS, TAG_TOKENS, make_model
from text_models import BACKENDS, wrap

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
        token_ids = np.flatnonzero(constraint.allowed())
        token_id = int(random.choice(token_ids))
        assert token_id < vocabulary.tokenizer.vocabulary_size, "a token that there is not"
        if token_id in vocabulary.stop_token_ids:
            return text + detokenizer.flush(), True
        constraint.commit(token_id)
        text += detokenizer.push(token_id)
        if constraint.complete:
            return text + detokenizer.flush(), True
    return text, False


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
        st.sampled_from(["^[a-zæøå]{2,5}$", "^(ja|nei)$", "^\\d{1,3}$"]).map(lambda p: {"type": "string", "pattern": p}),
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
                "maxProperties": 9,
            }
            if made[1] is not False
            else {
                "type": "object",
                "properties": {key: schema for key, (schema, _) in made[0].items()},
                "required": [key for key, (_, required) in made[0].items() if required],
                "additionalProperties": False,
            }
        ),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda made: {"type": "array", "items": made[0], "minItems": made[1], "maxItems": made[1] + made[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda of: {"anyOf": of}),
        st.lists(inner, min_size=1, max_size=2).map(
            lambda of: {"type": "array", "prefixItems": of, "items": False, "minItems": len(of)}
        ),
        inner.map(lambda schema: {"$defs": {"x": schema}, "anyOf": [{"$ref": "#/$defs/x"}]}),
    )


@given(st.recursive(leaves(), branches, max_leaves=5), st.integers(0, 2**32))
def test_what_is_written_for_any_schema_is_valid(schema, seed):
    schema = json.loads(json.dumps(schema).replace("#/$defs/x", "#/$defs/x"))
    if "$ref" in json.dumps(schema) and "$defs" not in schema:
        return  # the definition went down with the schema around it
    try:
        compiled = compile_structure(Structure.json_schema(schema), VOCABULARIES["byte-level"])
    except UsageError as error:  # a bound that no value meets, or what is not supported together
        assert re.search("cannot be used|cannot be kept to", error.message)
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
    assert not any(re.search(r'\s[{}\[\]:,]|[{\[]\s', re.sub(r'"(\\.|[^"\\])*"', "", text)) for text in written)
