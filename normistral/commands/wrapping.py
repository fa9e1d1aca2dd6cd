"""Line breaks between words, for text that a terminal of some width shows.

Widths are in terminal cells: combining marks take none, East Asian characters and emoji two. It writes nothing, and
knows no colours.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

_TAB_CELLS = 8
_LEAST_CELLS = 10  # narrower terminals are left to themselves
_NO_BREAK_SPACES = "\xa0\u2007\u202f"


def terminal_columns(stream: TextIO) -> int:
    """Columns of the stream's terminal now; of one that does not say, COLUMNS or 80."""
    with suppress(OSError, ValueError):
        if columns := os.get_terminal_size(stream.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns


def cell_width(text: str) -> int:
    """Terminal cells that a text without control characters takes."""
    if text.isascii():
        return len(text)
    from wcwidth import wcswidth  # knows emoji sequences; 20 ms to import

    width: int = wcswidth(text)
    return width if width >= 0 else len(text)


class WordWrapper:
    """Breaks a text that comes in pieces between its words.

    A word is given out when its end is seen: at a blank, or at `finish`. One that does not fit into the rest of the
    line goes to the next one, without the blanks before it. A word as wide as a line is given out as it comes, and the
    terminal breaks it. Lines that fit are never changed.

    Args:
        columns: gives the terminal's width; it is asked at every word, because a window may change its size.
        indent: of the lines that a break begins.
    """

    def __init__(self, columns: Callable[[], int], indent: str = "") -> None:
        self._columns, self._indent = columns, indent
        self._column = 0  # cells of the current line that are given out
        self._blanks = ""  # before the word
        self._word = ""
        self._in_long_word = False  # its beginning, as wide as a line, is given out

    @property
    def at_line_start(self) -> bool:
        """True if the current line is empty, and no word waits for it."""
        return not (self._column or self._blanks or self._word)

    def feed(self, text: str) -> str:
        """The text that can be written once this piece is there."""
        return "".join(self._take(character) for character in text)

    def finish(self) -> str:
        """The rest, without blanks at the end."""
        rest = self._end_word()
        self._blanks = ""
        return rest

    def _take(self, character: str) -> str:
        if character == "\n":
            rest = self._end_word() + self._blanks + "\n"
            self._blanks, self._column = "", 0
            return rest
        if character.isspace() and character not in _NO_BREAK_SPACES:
            rest = self._end_word()
            self._blanks += character
            return rest
        if self._in_long_word:
            self._column = (self._column + cell_width(character)) % max(1, self._columns())  # the terminal breaks it
            return character
        rest = self._end_word() if self._breaks_before(character) else ""
        self._word += character
        if cell_width(self._word) >= self._line_cells():
            rest += self._end_word()
            self._in_long_word = True
        return rest

    def _breaks_before(self, character: str) -> bool:
        """Between ideographs, and between one and a letter, but not before punctuation and marks."""
        if not self._word or unicodedata.category(character)[0] not in "LN":
            return False
        return _is_ideograph(self._word[-1]) or _is_ideograph(character)

    def _end_word(self) -> str:
        """The word with the blanks before it, or with a line break in their place."""
        self._in_long_word = False
        if not self._word:
            return ""
        before, word = self._blanks, self._word
        self._blanks = self._word = ""
        column, cells = _advance(self._column, before), cell_width(word)
        if self._column > 0 and column + cells > self._line_cells():
            before, column = "\n" + self._indent, cell_width(self._indent)
        self._column = column + cells
        return before + word

    def _line_cells(self) -> int:
        """One less than the terminal has: some break a line as soon as it is full."""
        return max(_LEAST_CELLS, self._columns() - 1)


def wrap_text(text: str, columns: int, indent: str = "") -> str:
    """A whole text in lines of at most so many columns, as far as its words are not wider.

    Args:
        indent: of the lines that a break begins.
    """
    wrapper = WordWrapper(lambda: columns, indent)
    return wrapper.feed(text) + wrapper.finish()


def crop(text: str, cells: int) -> str:
    """The beginning of a line in at most so many cells; what is left out is left out after a whole word."""
    if cell_width(text) <= cells:
        return text
    kept = ""
    for word in text.split(" "):
        longer = f"{kept} {word}" if kept else word
        if cell_width(longer) + 2 > cells:
            break
        kept = longer
    return f"{kept} …" if kept else "…"


def _is_ideograph(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character) == "Lo"


def _advance(column: int, blanks: str) -> int:
    for blank in blanks:
        column += _TAB_CELLS - column % _TAB_CELLS if blank == "\t" else cell_width(blank)
    return column
