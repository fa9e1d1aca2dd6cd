"""Progress of long work: stages with amounts, and notes.

Long work opens stages and advances them; its caller chooses where they are shown: a terminal, a log, a test, nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were just read or written, such as `Stage.advance`."""


def ignore_bytes(count: int) -> None:
    """An `OnBytes` that shows nothing."""


class Stage(Protocol):
    """One running stage."""

    def advance(self, amount: int) -> None:
        """Add `amount` units (bytes, tensors, files) to what is done."""
        ...

    def set_total(self, total: int | None) -> None:
        """Set how many units there are in all, once known."""
        ...


class Progress(Protocol):
    """Receives stages and notes."""

    def stage(self, title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Stage]:
        """A stage that is running while the context is open; `unit` "bytes" is shown as MB, GB."""
        ...

    def note(self, text: str) -> None:
        """One line that the user should see: a choice that was made, or something found."""
        ...


class Uncounted:
    """A stage whose amounts are not shown."""

    def advance(self, amount: int) -> None:
        """Dropped."""

    def set_total(self, total: int | None) -> None:
        """Dropped."""


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """A stage that is not shown."""
        yield Uncounted()

    def note(self, text: str) -> None:
        """Dropped."""


def format_bytes(count: int) -> str:
    """`count` bytes in the unit that gives one to three digits before the point (powers of 1000)."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
