"""Text that remembers, character by character, who wrote it: the template or a message.

`TrackedText` is a `str` whose operations carry that knowledge along. Where one cannot, the result belongs to `UNKNOWN`;
nothing but the template's own literals ever becomes `TEMPLATE`, so an operation forgotten here cannot make a message
look like the template. Sizes are asked from the render budget before anything is made. It does not know jinja.
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


def owners_of(text: str) -> str:
    """One of TEMPLATE, MESSAGE, UNKNOWN for each character."""
    return text.owners if isinstance(text, TrackedText) else UNKNOWN * len(text)


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


class TrackedText(str):
    """A string with an owner for each character. Equal to, and hashed like, the plain string `str.__str__(self)`.

    Args:
        text: the characters.
        owners: as many letters out of TEMPLATE, MESSAGE, UNKNOWN; by default those of `text`.
    """

    __slots__ = ("owners",)
    owners: str

    def __new__(cls, text: str = "", owners: str | None = None) -> TrackedText:
        current_budget().reserve(len(text))
        self = super().__new__(cls, text)
        self.owners = owners_of(text) if owners is None else owners
        assert len(self.owners) == len(self)
        return self

    @classmethod
    def following(cls, text: str, *sources: Any) -> TrackedText:
        """A result made of `sources` in an order not followed: theirs if they agree, otherwise unknown."""
        owners = {owner for source in sources for owner in (owners_of(source) if isinstance(source, str) else UNKNOWN)}
        return cls(text, (owners.pop() if len(owners) == 1 else UNKNOWN) * len(text))

    def __str__(self) -> TrackedText:  # `str(x)` in a compiled template keeps the owners
        return self

    def __add__(self, other: str) -> TrackedText:
        if not isinstance(other, str):
            return NotImplemented
        current_budget().reserve(len(self) + len(other))
        return TrackedText(str.__add__(self, other), self.owners + owners_of(other))

    def __radd__(self, other: str) -> TrackedText:
        if not isinstance(other, str):
            return NotImplemented
        current_budget().reserve(len(self) + len(other))
        return TrackedText(str.__add__(other, self), owners_of(other) + self.owners)

    def __mul__(self, count: SupportsIndex) -> TrackedText:
        if not isinstance(count, int):
            return NotImplemented
        current_budget().reserve(len(self) * max(count, 0))
        return TrackedText(str.__mul__(self, count), self.owners * count)

    __rmul__ = __mul__

    def __mod__(self, arguments: Any) -> TrackedText:
        reserve_formatting(self, str.count(self, "%"), arguments)
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        return TrackedText.following(str.__mod__(self, arguments), self, *values)

    def __getitem__(self, key: SupportsIndex | slice) -> TrackedText:
        return TrackedText(str.__getitem__(self, key), self.owners[key])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    # --- pieces of itself

    def strip(self, chars: str | None = None, /) -> TrackedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TrackedText:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TrackedText:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> TrackedText:
        return self[len(prefix) if self.startswith(prefix) else 0 :]

    def removesuffix(self, suffix: str, /) -> TrackedText:
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

    def join(self, parts: Iterable[str], /) -> TrackedText:
        texts = list(parts)
        size = len(self) * len(texts) + sum(len(text) for text in texts if isinstance(text, str))
        current_budget().reserve(size)
        return TrackedText(str.join(self, texts), self.owners.join(owners_of(text) for text in texts))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TrackedText:
        if old:
            return TrackedText(new).join(self.split(old, count))
        parts = ["", *self, ""]
        slots = len(parts) if int(count) < 0 else int(count) + 1
        return TrackedText(new).join(parts[:slots]) + TrackedText().join(parts[slots:])

    # --- letter by letter

    def lower(self) -> TrackedText:
        return self._respelled(str.lower)

    def upper(self) -> TrackedText:
        return self._respelled(str.upper)

    def casefold(self) -> TrackedText:
        return self._respelled(str.casefold)

    def capitalize(self) -> TrackedText:
        return self._respelled(str.capitalize)

    def title(self) -> TrackedText:
        return self._respelled(str.title)

    def swapcase(self) -> TrackedText:
        return self._respelled(str.swapcase)

    def _respelled(self, spell: Callable[[str], str]) -> TrackedText:
        """Case mappings never drop a character, so an equal length means one for one (ß becomes SS)."""
        text = spell(self)
        return TrackedText(text, self.owners) if len(text) == len(self) else TrackedText.following(text, self)

    # --- padded

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> TrackedText:
        return self._padded(str.ljust, width, fillchar)

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> TrackedText:
        return self._padded(str.rjust, width, fillchar)

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> TrackedText:
        return self._padded(str.center, width, fillchar)

    def zfill(self, width: SupportsIndex, /) -> TrackedText:
        return self._padded(str.zfill, width)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> TrackedText:
        current_budget().reserve(len(self) + self.count("\t") * abs(int(tabsize)))
        return self._padded(str.expandtabs, tabsize)

    def _padded(self, pad: Callable[..., str], width: SupportsIndex, *fill: str) -> TrackedText:
        require_width(width)
        return TrackedText.following(pad(self, width, *fill), self, *fill)

    # --- not for templates: the result is no text, or its size cannot be told before

    def encode(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TemplateError("the chat template calls .encode on text, which is not supported", HINT)

    def translate(self, *arguments: Any) -> NoReturn:
        raise TemplateError("the chat template calls .translate on text, which is not supported", HINT)
