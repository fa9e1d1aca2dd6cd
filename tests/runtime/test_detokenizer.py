"""Streaming: whole characters, and together exactly what decoding at once gives."""

from __future__ import annotations

import functools
import json
import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_models import BACKENDS, byte_level, copy, sentencepiece, wrap
from tokenizers import decoders

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError
from normistral.runtime.detokenizer import StreamDetokenizer

TEXTS = [
    "Blåbærsyltetøy på Ærøy",
    "😀",
    "a 😀😀 b",
    "👩‍👩‍👧 og ❤️‍🔥!",
    " blank først",
    "日本語\n\n",
    "en\n to\n \n  tre\n",
    "\ufffd",
    "x\ufffdy\ufffd",
]


@functools.cache
def unigram_like() -> tokenizers.Tokenizer:
    backend = copy(sentencepiece("always"))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend


@functools.cache
def demo_like() -> tokenizers.Tokenizer:
    """The decoder that a GGUF file is converted to."""
    backend = copy(byte_level())
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    backend.decoder = decoders.Sequence(steps)
    return backend


@functools.cache
def eleven_b_like() -> tokenizers.Tokenizer:
    """NorMistral-11B's: what is replaced may begin in one token and end in the next."""
    backend = copy(byte_level())
    steps = [decoders.ByteLevel(), decoders.Strip(" ", 1, 0), decoders.Replace("\n ", "\n")]
    backend.decoder = decoders.Sequence(steps)
    return backend


DECODERS = BACKENDS | {"metaspace decoder": unigram_like, "from GGUF": demo_like, "11B": eleven_b_like}


def stream(tokenizer, ids, prompt=()) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_decoded_text(kind, text):
    tokenizer = wrap(DECODERS[kind]())
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_give_the_decoded_text(kind, data):
    """Also ids that no text encodes to: broken UTF-8, byte tokens in any order, special tokens, unknown ids."""
    tokenizer = wrap(DECODERS[kind]())
    byte_tokens = st.integers(6, 261)
    ids = data.draw(st.lists(st.one_of(byte_tokens, st.integers(0, tokenizer.vocabulary_size + 3)), max_size=24))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=12))
def test_malformed_utf8_is_replaced_as_the_decoder_does(raw):
    for tokenizer, name in ((wrap(byte_level()), byte_letter), (wrap(sentencepiece()), "<0x{:02X}>".format)):
        ids = [tokenizer.token_id(name(byte)) for byte in raw]
        assert None not in ids
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def byte_letter(byte: int) -> str:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return bytes_to_unicode()[byte]


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=30, deadline=None)
@given(prompt=st.text(alphabet="aå 😀\n", min_size=1), answer=st.text(alphabet="bø 🇳🇴\n"))
@example(prompt="😀", answer=" ")  # a prompt of byte tokens only, then what a step drops at the very beginning
def test_after_a_prompt_the_answer_is_what_it_adds(kind, prompt, answer):
    tokenizer = wrap(DECODERS[kind]())
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(answer, add_special_tokens=False)
    whole, before = tokenizer.decode(prompt_ids + answer_ids), tokenizer.decode(prompt_ids)
    assert whole.startswith(before)
    assert "".join(stream(tokenizer, answer_ids, prompt_ids)) == whole.removeprefix(before)


def test_the_first_blank_is_kept_after_a_prompt_and_dropped_without_one():
    tokenizer = wrap(sentencepiece())
    answer = tokenizer.encode("Oslo", add_special_tokens=False)
    assert "".join(stream(tokenizer, answer)) == "Oslo"
    assert "".join(stream(tokenizer, answer, tokenizer.encode("Norge"))) == " Oslo"
    only_special = [tokenizer.special_tokens["<s>"]]
    assert "".join(stream(tokenizer, answer, only_special)) == "Oslo"


def test_a_character_that_the_prompt_left_unfinished_belongs_to_the_answer():
    for tokenizer, name in ((wrap(byte_level()), byte_letter), (wrap(sentencepiece()), "<0x{:02X}>".format)):
        ids = [tokenizer.token_id(name(byte)) for byte in "😀🎉".encode()]
        assert "".join(stream(tokenizer, ids[6:], ids[:6])) == "🎉"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace first"])
def test_no_piece_holds_a_part_of_a_character(kind):
    tokenizer = wrap(BACKENDS[kind]())
    text = "På 👩‍👩‍👧 Ærøy 日本 "
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] != [text.strip()]
    detokenizer = StreamDetokenizer(wrap(byte_level()))
    smile = wrap(byte_level()).encode("😀", add_special_tokens=False)
    assert [detokenizer.push(token) for token in smile] == ["", "", "", "😀"]


def test_an_unfinished_character_is_replaced_at_the_end():
    tokenizer = wrap(byte_level())
    ids = tokenizer.encode("å😀", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "å\ufffd" == tokenizer.decode(ids)
    assert pieces[-1] == "\ufffd"


def test_special_tokens_are_no_text():
    tokenizer = wrap(byte_level())
    assert "".join(stream(tokenizer, tokenizer.encode("Oslo<|im_end|>"))) == "Oslo"


def test_a_token_costs_the_same_however_long_the_answer_is():
    """20 times the tokens may take 20 times as long, not 400; byte tokens that never end a run are the worst case."""
    tokenizer = wrap(sentencepiece())
    for token in ("<0xE2>", "▁i"):
        ids = [tokenizer.token_id(token)]
        took = []
        for count in (2_000, 40_000):
            start = time.perf_counter()
            stream(tokenizer, ids * count)
            took.append(time.perf_counter() - start)
        assert took[1] < 100 * took[0]


def test_an_unknown_decoder_is_named():
    description = json.loads(byte_level().to_str())
    for decoder, message in (
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        (None, "the tokenizer has no decoder"),
    ):
        description["decoder"] = decoder
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
        with pytest.raises(ArtifactError, match=message) as caught:
            StreamDetokenizer(tokenizer)
        assert caught.value.hint
