"""Stop texts in a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


class StopTexts:
    """Looks for stop texts across chunk borders and never lets part of one through.

    Text that might be the beginning of a stop text is held back until it is certain.

    Args:
        stops: the texts; none lets everything through.
        may_end: is given the text piece by piece, in order, and says whether it may end there; where it may not, a stop
            text is text. None lets every stop text end it.

    Attributes:
        found: the stop text that ended it.
    """

    def __init__(self, stops: Sequence[str], may_end: Callable[[str], bool] | None = None) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""
        self._may_end = may_end
        self._read = 0  # characters held that `may_end` has been given

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what is safe to show and whether a stop text was found (the text before it is returned)."""
        if not self._stops:
            return text, False
        self._held += text
        end = self._find_end()
        if end is not None:
            self.found = next(stop for stop in self._stops if self._held.startswith(stop, end))
            shown, self._held = self._held[:end], ""
            return shown, True
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        self._ends_at(cut)
        shown, self._held = self._held[:cut], self._held[cut:]
        self._read -= cut
        return shown, False

    def flush(self) -> str:
        """Text held back, once the answer has ended without completing a stop text."""
        shown, self._held = self._held, ""
        return shown

    def _find_end(self) -> int | None:
        """Where the first stop text begins that ends it."""
        places = sorted({at for stop in self._stops for at in _occurrences(self._held, stop)})
        if self._may_end is None:
            return places[0] if places else None
        return next((at for at in places if at >= self._read and self._ends_at(at)), None)

    def _ends_at(self, place: int) -> bool:
        """Read up to there; whether the text may end there."""
        if self._may_end is None or place < self._read:
            return False
        unread, self._read = self._held[self._read : place], place
        return self._may_end(unread)


def _occurrences(text: str, stop: str) -> Iterator[int]:
    at = text.find(stop)
    while at >= 0:
        yield at
        at = text.find(stop, at + 1)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
