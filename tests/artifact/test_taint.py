"""Text that remembers its author: equal to plain text under every operation, and never the template's by mistake."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normistral.artifact.taint import MESSAGE, TEMPLATE, UNKNOWN, RenderBudget, TaintedStr, sources_of, spending

LETTERS = "aBc \n\t,å"
OWNERS = st.fixed_dictionaries({letter: st.sampled_from([TEMPLATE, MESSAGE]) for letter in LETTERS})


@pytest.fixture(autouse=True)
def budget():
    with spending(RenderBudget(1000)) as current:
        yield current


def tracked(plain: str, owner_of: dict[str, str]) -> TaintedStr:
    return TaintedStr(plain, "".join(owner_of[letter] for letter in plain))


@settings(max_examples=150, deadline=None)
@given(
    plain=st.text(LETTERS, max_size=10), owner_of=OWNERS, sep=st.sampled_from([",", " ", "aB", "\n"]), data=st.data()
)
def test_each_character_keeps_its_owner(plain, owner_of, sep, data):
    """An owner for each letter, so that it can be seen where a character of a result came from."""
    count = data.draw(st.integers(-1, 3))
    key = slice(*(data.draw(st.none() | st.integers(-4, 4).filter(bool)) for _ in range(3)))
    with spending(RenderBudget(1000)):
        text = tracked(plain, owner_of)
        for name, *arguments in (
            *((name,) for name in ("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "__iter__")),
            *((name, sep) for name in ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix")),
            *((name, sep) for name in ("partition", "rpartition", "__add__")),
            *((name, blank, count) for name in ("split", "rsplit") for blank in (None, sep)),
            *(("replace", old, new, count) for old in ("", sep, "a") for new in ("", "xy")),
            ("join", ["x", text, "", "yz"]),
            ("splitlines", True),
            ("__getitem__", key),
            ("__mul__", count),
        ):
            result, expected = getattr(text, name)(*arguments), getattr(plain, name)(*arguments)
            pieces = [result] if isinstance(result, str) else list(result)
            assert pieces == ([expected] if isinstance(expected, str) else list(expected))
            foreign = arguments if name == "__add__" else []
            for piece in pieces:
                assert type(piece) is TaintedStr
                own = len(piece) - sum(map(len, foreign))
                for letter, owner in zip(piece[:own], piece.sources, strict=False):
                    assert owner == owner_of.get(letter, UNKNOWN)
        assert sources_of(text + "x") == text.sources + UNKNOWN
        assert sources_of("x" + text) == UNKNOWN + text.sources
        assert str(text) is text
        assert (text, hash(text)) == (plain, hash(plain))


@settings(max_examples=150, deadline=None)
@given(plain=st.text(LETTERS + "ßŉ", min_size=1, max_size=8), owner=st.sampled_from([TEMPLATE, MESSAGE, None]))
def test_what_is_respelled_or_padded_belongs_to_nobody_unless_it_has_one_author(plain, owner):
    with spending(RenderBudget(1000)):
        sources = (
            "".join((TEMPLATE, MESSAGE)[i % 2] for i in range(len(plain))) if owner is None else owner * len(plain)
        )
        text = TaintedStr(plain, sources)
        for name, *arguments in (
            *((name,) for name in ("lower", "upper", "title", "capitalize", "swapcase", "casefold", "expandtabs")),
            *((name, 12, TaintedStr(".", MESSAGE)) for name in ("center", "ljust", "rjust")),
            ("zfill", 7),
            ("__mod__", ()),
        ):
            result = getattr(text, name)(*arguments)
            assert result == getattr(plain, name)(*arguments)
            assert set(result.sources) <= ({owner, UNKNOWN} if owner else {TEMPLATE, MESSAGE, UNKNOWN})
            if len(result) != len(plain) and len(set(sources)) == 2:
                assert set(result.sources) == {UNKNOWN}


def test_foreign_text_is_unknown():
    template = TaintedStr("{} %s", TEMPLATE * 5)
    assert set((template % "x").sources) == {UNKNOWN}
    assert set((template % TaintedStr("x", TEMPLATE)).sources) == {TEMPLATE}
    assert template.replace("%s", "x").sources == TEMPLATE * 3 + UNKNOWN
    assert TaintedStr("x").sources == UNKNOWN
