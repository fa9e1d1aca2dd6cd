"""Taint tracking: which characters of a rendered conversation come from the template, and which from a message.

A chat template writes control tokens (<|im_end|>) as text, and a message may hold the same text. Encoded as one string,
a user could close his turn and write one of the system's. Engines that render and then tokenise (transformers, vLLM,
llama.cpp) accept that. Removing such text from messages changes what a user said, and escaping it needs a tokenizer
that was trained for it. Rendering with placeholders in place of contents fails where templates trim, cut, compare or
loop over them, as published ones do. So every character keeps its source through the template, and only control tokens
that stand wholly in the template's own text become ids. No library does this for jinja2 and str.

`TaintedStr` is a `str` whose operations carry the sources along. Where one cannot, the result is `UNKNOWN`; nothing but
the template's own literals ever becomes `TEMPLATE`, so an operation that is missing here cannot make a message look
like the template.

A template comes from a checkpoint, so it is not trusted. Nothing can interrupt one C call of Python, and a watchdog
thread could only be leaked; therefore every step of a template asks the `RenderBudget` *before* it makes something, and
looks at the clock. Neither knows jinja.
"""

# ruff: noqa: D102 - methods without a docstring are str's own

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, SupportsIndex

from normistral.errors import TemplateError

TIME_LIMIT_S = 2.0
BASE_SIZE = 2**20  # characters that a template may make of an empty conversation
SIZE_PER_INPUT = 4  # and more for each character of the messages
TOTAL_PER_SIZE = 64  # all values of one rendering together, in multiples of the largest single one
HINT = "the checkpoint's chat template is faulty or hostile: export with another template"


class RenderBudget:
    """Time and sizes left to one rendering.

    Args:
        input_size: characters in the messages.
    """

    def __init__(self, input_size: int) -> None:
        self.largest = BASE_SIZE + SIZE_PER_INPUT * input_size
        self._left = TOTAL_PER_SIZE * self.largest
        self._began = time.thread_time()
        self._look_at = time.monotonic() + TIME_LIMIT_S

    def tick(self) -> None:
        """Check the time; called at every step of the template.

        The limit is of processor time: on a busy machine a good template may stand still for seconds. That clock takes
        a system call, so it is read only when as much time has passed as may still be used.

        Raises:
            TemplateError: the time is over.
        """
        now = time.monotonic()
        if now > self._look_at:
            left = self._began + TIME_LIMIT_S - time.thread_time()
            if left <= 0:
                raise TemplateError(f"the chat template ran for more than {TIME_LIMIT_S:g} s", HINT)
            self._look_at = now + left

    def reserve(self, size: int) -> None:
        """Ask for a value of `size` characters or items before it is made.

        Raises:
            TemplateError: it, or everything made so far, is too large; or the time is over.
        """
        self.tick()
        self._left -= size
        if size > self.largest or self._left < 0:
            raise TemplateError(f"the chat template makes more than {self.largest} characters or items", HINT)


_current: ContextVar[RenderBudget] = ContextVar("render_budget")


def current_budget() -> RenderBudget:
    """The budget of the rendering that this thread is in."""
    return _current.get()


@contextmanager
def spending(budget: RenderBudget) -> Iterator[RenderBudget]:
    """Make `budget` the current one."""
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


def weigh(value: Any, limit: int) -> int:
    """Size of a value written out: characters plus items, shared parts counted as often as they appear.

    Stops soon after `limit`, so that a list that holds another twice, which holds another twice ..., costs nothing.
    """
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += len(item) + 2 if isinstance(item, str) else 2
        if isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
    return total


TEMPLATE = "t"
MESSAGE = "m"
UNKNOWN = "u"

MAX_WIDTH = 10_000  # of a padded field or an indent
_WIDE_FORMAT = re.compile(r"\d{5}|%[^%a-zA-Z]*\*|\{[^{}]*\{")


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a value that JSON can hold, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings_in(inner)


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


def _respelled(spell: Callable[[str], str]) -> Callable[[TaintedStr], TaintedStr]:
    """A mapping of case. None drops a character, so an equal length means one for one (ß becomes SS)."""

    def respelled(self: TaintedStr) -> TaintedStr:
        text = spell(self)
        return TaintedStr(text, self.sources) if len(text) == len(self) else TaintedStr.following(text, self)

    return respelled


def _padded(pad: Callable[..., str]) -> Callable[..., TaintedStr]:
    def padded(self: TaintedStr, width: SupportsIndex, *fill: str) -> TaintedStr:
        require_width(width)
        return TaintedStr.following(pad(self, width, *fill), self, *fill)

    return padded


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

    lower = _respelled(str.lower)
    upper = _respelled(str.upper)
    casefold = _respelled(str.casefold)
    capitalize = _respelled(str.capitalize)
    title = _respelled(str.title)
    swapcase = _respelled(str.swapcase)

    # --- padded

    ljust = _padded(str.ljust)
    rjust = _padded(str.rjust)
    center = _padded(str.center)
    zfill = _padded(str.zfill)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> TaintedStr:
        current_budget().reserve(len(self) + self.count("\t") * abs(int(tabsize)))
        return _padded(str.expandtabs)(self, tabsize)

    # --- not for templates: the result is no text, or its size cannot be told before

    def encode(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TemplateError("the chat template calls .encode on text, which is not supported", HINT)

    def translate(self, *arguments: Any) -> NoReturn:
        raise TemplateError("the chat template calls .translate on text, which is not supported", HINT)
