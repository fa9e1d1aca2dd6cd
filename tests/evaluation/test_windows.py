"""How a text is cut: every token once, enough in front of it, and llama.cpp's chunks as it makes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normistral.errors import UsageError
from normistral.evaluation.windows import Window, choose_windows, cut

BOS = 900


def choose(convention="sliding", length=None, stride=None, context_length=4096, bos_id=None):
    return choose_windows(convention, length, stride, context_length=context_length, bos_id=bos_id)


@st.composite
def sliding(draw):
    length = draw(st.integers(2, 40))
    stride = draw(st.none() | st.integers(1, length - 1))
    bos_id = draw(st.sampled_from([None, BOS]))
    return choose(length=length, stride=stride, bos_id=bos_id), draw(st.integers(2, 200))


@given(sliding())
def test_sliding_windows_score_every_token_once_and_in_order(case):
    settings, tokens = case
    windows = cut(range(tokens), settings)
    scored = [token for window in windows for token in window.targets]
    assert scored == list(range(0 if settings.bos_id == BOS else 1, tokens))
    assert [window.start for window in windows] == [window.targets[0] for window in windows]


@given(sliding())
def test_sliding_windows_fill_the_length_and_hold_consecutive_text(case):
    settings, tokens = case
    windows = cut(range(tokens), settings)
    head = [] if settings.bos_id is None else [BOS]
    for window in windows:
        text = list(window.token_ids[len(head) :])
        assert list(window.token_ids[: len(head)]) == head
        assert text == list(range(text[0], text[-1] + 1))
        assert len(window.token_ids) == min(settings.length, len(head) + tokens)
        assert window.fed_ids == window.token_ids[:-1]


@given(st.integers(2, 64), st.sampled_from([None, BOS]), st.integers(2, 400))
def test_by_default_half_a_window_stands_before_every_token_behind_the_first_window(length, bos_id, tokens):
    settings = choose(length=length, bos_id=bos_id)
    for window in cut(range(tokens), settings)[1:]:
        assert len(window.token_ids) - window.scored >= length / 2


def test_the_defaults_are_512_tokens_or_the_context():
    assert (choose().length, choose().stride) == (512, 256)
    assert (choose(context_length=64).length, choose(context_length=64).stride) == (64, 32)
    assert (choose("llama.cpp").length, choose("llama.cpp").stride) == (512, None)


def test_llama_cpp_scores_the_second_half_of_chunks_that_do_not_overlap():
    windows = cut(range(20), choose("llama.cpp", 8))
    # first = 8 / 2 = 4; the logits at 4, 5 and 6 predict the tokens at 5, 6 and 7; four tokens are left over.
    assert windows == [
        Window((0, 1, 2, 3, 4, 5, 6, 7), start=5, scored=3),
        Window((8, 9, 10, 11, 12, 13, 14, 15), start=13, scored=3),
    ]
    assert [window.targets for window in windows] == [(5, 6, 7), (13, 14, 15)]


def test_llama_cpp_puts_the_bos_in_the_place_of_each_chunks_first_token():
    windows = cut(range(17), choose("llama.cpp", 8, bos_id=BOS))
    # It encodes 18 tokens, the BOS first: the second chunk begins with token 7, whose place the BOS takes.
    assert windows == [
        Window((BOS, 0, 1, 2, 3, 4, 5, 6), start=4, scored=3),
        Window((BOS, 8, 9, 10, 11, 12, 13, 14), start=12, scored=3),
    ]


def test_llama_cpp_scores_255_of_512_and_wants_two_chunks():
    windows = cut(range(1500), choose("llama.cpp"))
    assert [window.scored for window in windows] == [255, 255]
    assert windows[1].start == 512 + 257
    with pytest.raises(UsageError, match=r"has 1023 tokens; llama\.cpp's convention needs twice the window, 1024"):
        cut(range(1023), choose("llama.cpp"))
    assert len(cut(range(1023), choose("llama.cpp", bos_id=BOS))) == 2


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_text_of_less_than_two_tokens_is_refused(tokens):
    with pytest.raises(UsageError, match=f"the text has {tokens} tokens; at least 2 are needed"):
        cut(range(tokens), choose())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "strided"}, "--windows strided is unknown"),
        ({"length": 1}, "a window of 1 tokens is not possible"),
        ({"length": 4097}, "a window of 4097 tokens is not possible"),
        ({"convention": "llama.cpp", "length": 2}, "a window of 2 tokens is not possible"),
        ({"length": 8, "stride": 0}, "a stride of 0 tokens is not possible"),
        ({"length": 8, "stride": 8}, "a stride of 8 tokens is not possible"),
        ({"convention": "llama.cpp", "stride": 8}, "--stride means nothing with --windows llama.cpp"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        choose(**options)
