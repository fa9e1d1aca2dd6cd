"""Taint tracking: which characters of a rendered conversation come from the template, and which from a message.

A chat template writes control tokens (<|im_end|>) as text, and a message may hold the same text. Encoded as one string,
a user could close his turn and write one of the system's. Engines that render and then tokenise (transformers, vLLM,
llama.cpp) accept that. Removing such text from messages changes what a user said, and escaping it needs a tokenizer
that was trained for it. Rendering with placeholders in place of contents fails where templates trim, cut, compare or
loop over them, as published ones do. So every character keeps its source through the template, and only control tokens
that stand wholly in the template's own text become ids. No library does this for jinja2 and str.

`TaintedStr` is a `str` whose operations carry the sources along. Where one cannot, the result is `UNKNOWN`; nothing but
the template's own literals ever becomes `TEMPLATE`, so an operation that is missing here cannot make a message look
like the template. Sizes are asked from the render budget before anything is made. It does not know jinja.
"""

# ruff: noqa: D102 - methods without a docstring are str's own

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, SupportsIndex

from normistral.artifact.render_budget import HINT, current_budget, weigh
from normistral.errors import TemplateError

TEMPLATE = "t"
MESSAGE = "m"
UNKNOWN = "u"

MAX_WIDTH = 10_000  # of a padded field or an indent
_WIDE_FORMAT = re.compile(r"\d{5}|%[^%a-zA-Z]*\*|\{[^{}]*\{")


def sources_of(text: str) -> str:
    """One of TEMPLATE, MESSAGE, UNKNOWN for each character."""
    return text.sources if isinstance(text, TaintedStr) else UNKNOWN * len(text)


def require_width(width: Any) -> None:
    """Refuse a field width that only wastes memory."""
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise TemplateError(f"the chat template pads to a width of more than {MAX_WIDTH}", HINT)


def reserve_formatting(pattern: str, fields: int, arguments: Any) -> None:
    """Ask for the result of `%` or `.format` with so many fields."""
    if _WIDE_FORMAT.search(pattern):
        raise TemplateError("the chat template formats text with a computed or very large width", HINT)
    budget = current_budget()
    budget.reserve(len(pattern) + fields * (weigh(arguments, budget.largest) + MAX_WIDTH))


class TaintedStr(str):
    """A string with a source for each character. Equal to, and hashed like, the plain string `str.__str__(self)`.

    Args:
        text: the characters.
        sources: as many letters out of TEMPLATE, MESSAGE, UNKNOWN; by default those of `text`.
    """

    __slots__ = ("sources",)
    sources: str

    def __new__(cls, text: str = "", sources: str | None = None) -> TaintedStr:
        current_budget().reserve(len(text))
        self = super().__new__(cls, text)
        self.sources = sources_of(text) if sources is None else sources
        assert len(self.sources) == len(self)
        return self

    @classmethod
    def following(cls, text: str, *parts: Any) -> TaintedStr:
        """A result made of `parts` in an order not followed: their source if they have one, otherwise unknown."""
        sources = {source for part in parts for source in (sources_of(part) if isinstance(part, str) else UNKNOWN)}
        return cls(text, (sources.pop() if len(sources) == 1 else UNKNOWN) * len(text))

    def __str__(self) -> TaintedStr:  # `str(x)` in a compiled template keeps the sources
        return self

    def __add__(self, other: str) -> TaintedStr:
        if not isinstance(other, str):
            return NotImplemented
        current_budget().reserve(len(self) + len(other))
        return TaintedStr(str.__add__(self, other), self.sources + sources_of(other))

    def __radd__(self, other: str) -> TaintedStr:
        if not isinstance(other, str):
            return NotImplemented
        current_budget().reserve(len(self) + len(other))
        return TaintedStr(str.__add__(other, self), sources_of(other) + self.sources)

    def __mul__(self, count: SupportsIndex) -> TaintedStr:
        if not isinstance(count, int):
            return NotImplemented
        current_budget().reserve(len(self) * max(count, 0))
        return TaintedStr(str.__mul__(self, count), self.sources * count)

    __rmul__ = __mul__

    def __mod__(self, arguments: Any) -> TaintedStr:
        reserve_formatting(self, str.count(self, "%"), arguments)
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        return TaintedStr.following(str.__mod__(self, arguments), self, *values)

    def __getitem__(self, key: SupportsIndex | slice) -> TaintedStr:
        return TaintedStr(str.__getitem__(self, key), self.sources[key])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    # --- pieces of itself

    def strip(self, chars: str | None = None, /) -> TaintedStr:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TaintedStr:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TaintedStr:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> TaintedStr:
        return self[len(prefix) if self.startswith(prefix) else 0 :]

    def removesuffix(self, suffix: str, /) -> TaintedStr:
        return self[: len(self) - len(suffix) if self.endswith(suffix) else len(self)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut_in_three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._cut_in_three(str.rpartition(self, sep))

    def _cut_in_three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        start, end = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:start], self[start:end], self[end:]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """The parts as slices: next to their separator or, for blanks, at the next place where they are found."""
        pieces: list[str] = []
        position = 0
        for part in parts:
            start = position if sep is not None else str.find(self, part, position)
            pieces.append(self[start : start + len(part)])
            position = start + len(part) + len(sep or "")
        return pieces

    def splitlines(self, keepends: bool = False) -> list[str]:
        pieces: list[str] = []
        position = 0
        for whole, line in zip(str.splitlines(self, True), str.splitlines(self, keepends), strict=True):
            pieces.append(self[position : position + len(line)])
            position += len(whole)
        return pieces

    # --- put together with others

    def join(self, parts: Iterable[str], /) -> TaintedStr:
        texts = list(parts)
        size = len(self) * len(texts) + sum(len(text) for text in texts if isinstance(text, str))
        current_budget().reserve(size)
        return TaintedStr(str.join(self, texts), self.sources.join(sources_of(text) for text in texts))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TaintedStr:
        if old:
            return TaintedStr(new).join(self.split(old, count))
        parts = ["", *self, ""]
        slots = len(parts) if int(count) < 0 else int(count) + 1
        return TaintedStr(new).join(parts[:slots]) + TaintedStr().join(parts[slots:])

    # --- letter by letter

    def lower(self) -> TaintedStr:
        return self._respelled(str.lower)

    def upper(self) -> TaintedStr:
        return self._respelled(str.upper)

    def casefold(self) -> TaintedStr:
        return self._respelled(str.casefold)

    def capitalize(self) -> TaintedStr:
        return self._respelled(str.capitalize)

    def title(self) -> TaintedStr:
        return self._respelled(str.title)

    def swapcase(self) -> TaintedStr:
        return self._respelled(str.swapcase)

    def _respelled(self, spell: Callable[[str], str]) -> TaintedStr:
        """Case mappings never drop a character, so an equal length means one for one (ß becomes SS)."""
        text = spell(self)
        return TaintedStr(text, self.sources) if len(text) == len(self) else TaintedStr.following(text, self)

    # --- padded

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> TaintedStr:
        return self._padded(str.ljust, width, fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> TaintedStr:
        return self._padded(str.rjust, width, fillchar)

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> TaintedStr:
        return self._padded(str.center, width, fillchar)

    def zfill(self, width: SupportsIndex, /) -> TaintedStr:
        return self._padded(str.zfill, width)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> TaintedStr:
        current_budget().reserve(len(self) + self.count("\t") * abs(int(tabsize)))
        return self._padded(str.expandtabs, tabsize)

    def _padded(self, pad: Callable[..., str], width: SupportsIndex, *fill: str) -> TaintedStr:
        require_width(width)
        return TaintedStr.following(pad(self, width, *fill), self, *fill)

    # --- not for templates: the result is no text, or its size cannot be told before

    def encode(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TemplateError("the chat template calls .encode on text, which is not supported", HINT)

    def translate(self, *arguments: Any) -> NoReturn:
        raise TemplateError("the chat template calls .translate on text, which is not supported", HINT)
