from hypothesis import given
from hypothesis import strategies as st

from normistral.runtime.stopping import StopTexts


def run(stops, pieces):
    stop_texts = StopTexts(stops)
    shown = ""
    for piece in pieces:
        text, stopped = stop_texts.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + stop_texts.flush(), False


def test_nothing_of_a_stop_text_gets_through():
    assert run(["\nBokmål:"], ["Hei", "\nBok", "mål", ": mer"]) == ("Hei", True)


def test_what_only_looked_like_a_stop_text_is_shown():
    assert run(["</s>"], ["a <", "/", "b"]) == ("a </b", False)
    assert run(["</s>"], ["a </s"]) == ("a </s", False)


def test_the_earliest_stop_text_wins():
    assert run(["tre", "to"], ["en to tre"]) == ("en ", True)


def test_of_two_at_one_place_the_first_given_is_told():
    for stops in (["to", "to tre"], ["to tre", "to"]):
        stop_texts = StopTexts(stops)
        assert stop_texts.push("en to tre") == ("en ", True)
        assert stop_texts.found == stops[0]


def test_text_before_it_is_shown_as_soon_as_it_is_certain():
    stop_texts = StopTexts(["xyz"])
    assert stop_texts.push("abx") == ("ab", False)
    assert stop_texts.push("q") == ("xq", False)


@given(st.lists(st.text("abå", max_size=4), max_size=8), st.lists(st.text("abå", min_size=1, max_size=3), max_size=3))
def test_chunking_does_not_matter(pieces, stops):
    whole = "".join(pieces)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    expected = (whole[: min(cuts)], True) if cuts else (whole, False)
    shown, stopped = run(stops, pieces)
    # Two stop texts may overlap: which one completes first then depends on where the pieces end.
    assert stopped == expected[1]
    assert whole.startswith(shown)
    if not stopped or len(stops) == 1:
        assert shown == expected[0]
    assert not any(stop in shown for stop in stops)


def test_where_the_text_may_not_end_a_stop_text_is_text():
    read = []

    def may_end(piece):
        read.append(piece)
        return "".join(read).count("a") >= 2

    stop_texts = StopTexts(["--", "-x"], may_end)
    shown = [stop_texts.push(piece) for piece in ["a-", "-b-", "-a--"]]
    assert shown == [("a", False), ("--b", False), ("--a", True)]
    assert "".join(read) == "a--b--a"  # each character once, in order
