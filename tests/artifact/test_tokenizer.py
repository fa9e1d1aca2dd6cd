"""Tokenizer: the same ids and text as transformers, and errors a user can read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import BACKENDS, SPECIALS, byte_level, reference, sentencepiece, wrap

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError, UsageError

TEXTS = ["", " ", "Blåbærsyltetøy på brødskive", "  to  blanke ", "😀 ❤️‍🔥\n\tæøå", "a<|im_end|>b</s> c", "<s>hei"]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(kind, text):
    tokenizer, expected = wrap(BACKENDS[kind]()), reference(BACKENDS[kind]())
    ids = tokenizer.encode(text)
    assert ids == expected(text).input_ids
    assert ids[0] == tokenizer.special_tokens["<s>"]
    assert tokenizer.encode(text, add_special_tokens=False) == expected(text, add_special_tokens=False).input_ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace first"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_whole(kind, text):
    tokenizer = wrap(BACKENDS[kind]())
    assert tokenizer.encode(text) == reference(BACKENDS[kind]())(text).input_ids
    if kind == "byte-level" and not any(special in text for special in SPECIALS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_and_special_tokens():
    tokenizer = wrap(byte_level())
    assert tokenizer.special_tokens == {text: index for index, text in enumerate(SPECIALS)}
    assert tokenizer.vocabulary_size == byte_level().get_vocab_size()
    assert tokenizer.token_id("<|im_end|>") == 5
    assert tokenizer.token_text(5) == "<|im_end|>"
    assert tokenizer.token_text(tokenizer.vocabulary_size) is None
    assert tokenizer.token_id("finnes ikke") is None
    assert tokenizer.is_special(5)
    assert not tokenizer.is_special(50)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    description = json.loads(byte_level().to_str())
    description["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    text = "Hva heter hovedstaden i Norge?" * 5
    assert Tokenizer.from_folder(tmp_path).encode(text) == wrap(byte_level()).encode(text)


def test_half_a_character_is_refused_with_its_place():
    with pytest.raises(UsageError) as caught:
        wrap(byte_level()).encode("ab\udce5c")
    assert caught.value.message == "the text holds U+DCE5 at position 2, which is half a character"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json is missing"),
        (b"", "is not a valid tokenizer: EOF"),
        (b"{}", "is not a valid tokenizer: "),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "x"}}}', "is not a valid tokenizer: "),
    ],
)
def test_a_missing_or_damaged_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_truncated_file_is_named(tmp_path):
    text = sentencepiece().to_str()
    for cut in range(1, len(text), len(text) // 20):
        (tmp_path / "tokenizer.json").write_text(text[:cut], encoding="utf-8")
        with pytest.raises(ArtifactError):
            Tokenizer.from_folder(tmp_path)
