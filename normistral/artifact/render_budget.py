"""Limits of one rendering of a chat template: time, size of one value, size of all text together.

A template comes from a checkpoint, so it is not trusted. Nothing can interrupt one C call of Python, and a watchdog
thread could only be leaked; therefore every step of a template asks here *before* it makes something, and looks at the
clock. It does not know jinja.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def tick(self) -> None:
        """Check the time; called at every step of the template.

        Raises:
            TemplateError: the time is over.
        """
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template ran for more than {TIME_LIMIT_S:g} s", HINT)

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
