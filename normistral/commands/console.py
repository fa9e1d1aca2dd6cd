"""Output and input of the terminal: answers on stdout, all else on stderr, one `error:` and one `hint:` line.

Independent of models, and of heavy imports, so that errors and the help come at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from normistral.commands.translate import translate
from normistral.commands.wrapping import WordWrapper, cell_width, terminal_columns, wrap_text
from normistral.errors import NormistralError, UsageError
from normistral.text_input import BOM

DIM, RED, YELLOW, CYAN = "2", "1;31", "33", "36"  # SGR parameters (ECMA-48, 8.3.117)

NO_STDOUT = "stdout is closed: there is nowhere to write the result"
STDOUT_HINT = "send it somewhere, such as > FILE, or > /dev/null"
_GAP = 2  # blanks between columns
_LEAST_LAST_COLUMN = 24  # cells; narrower ones are hard to read

_DEFAULT_HINT = "normistral --help, or --help after a command, says what is possible"
_PICTURES = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}  # the block Control Pictures: ESC is ␛
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # C1: there CSI is one character
)


def use_utf8() -> None:
    """Write UTF-8 whatever the locale says, so that Norwegian letters come out whole."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)  # a stream may be replaced by something simpler
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors=errors)


def reopen_closed_streams() -> None:
    """Put something behind file descriptors 0 to 2 that the caller closed (`>&-`), or the next files opened get them.

    stdin stays None. Writing to stdout fails as it does on a closed descriptor; what goes to stderr is dropped.
    """
    for number, stream, flags in (
        (0, sys.stdin, os.O_RDONLY),
        (1, sys.stdout, os.O_RDONLY),
        (2, sys.stderr, os.O_WRONLY),
    ):
        if stream is None and not _is_open(number):
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def require_stdout() -> None:
    """Refuse a closed stdout before long work whose result goes there.

    Raises:
        NormistralError: it is closed.
    """
    if not is_writable(sys.stdout):
        raise NormistralError(NO_STDOUT, STDOUT_HINT)


def is_writable(stream: TextIO) -> bool:
    """True if an empty write succeeds, or the stream has no file descriptor."""
    try:
        os.write(stream.fileno(), b"")
    except (OSError, ValueError) as exc:
        return isinstance(exc, ValueError) or exc.errno != errno.EBADF
    return True


def drop_stdout() -> None:
    """Redirect stdout to /dev/null, so that the interpreter can flush it when it ends."""
    _drop(1)


def drop_unwritable() -> None:
    """Redirect stdout and stderr to /dev/null if they cannot be flushed: Python 3.13 would end with exit code 120."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(number)


def _drop(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """True for an open stream that is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def colour(text: str, sgr: str, stream: TextIO) -> str:
    """`text` in a colour if `stream` is a terminal that shows them, and NO_COLOR (no-color.org) is not set."""
    plain = not is_terminal(stream) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{sgr}m{text}\x1b[0m"


def harmless(text: str) -> str:
    """Control characters (ESC, C0, DEL, C1) as visible signs, so that no text steers a terminal; keeps \\n and \\t."""
    return text.translate(_PICTURES)


def one_line(text: str) -> str:
    """`text` in one line, without control characters."""
    return harmless(re.sub(r"\s+", " ", text).strip())


def say(text: str) -> None:
    """A line about what is going on, on stderr."""
    print_diagnostic(colour(_fitted(one_line(translate(text)), sys.stderr), DIM, sys.stderr))


def warn(text: str) -> None:
    """One `warning:` line on stderr."""
    _print_labelled("warning:", YELLOW, text)


def confirm(question: str, *, default: bool) -> bool:
    """A yes or no typed at the terminal; English and Norwegian answers count, Enter and Ctrl-D are the default and no.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    choices = translate("[Y/n]") if default else translate("[y/N]")
    print(f"{translate(question)} {choices} ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)
        return False
    answer = line.strip().lower()
    return default if not answer else answer in ("y", "yes", "j", "ja")


def print_error(message: str, hint: str) -> None:
    """One `error:` line and one `hint:` line on stderr."""
    _print_labelled("error:", RED, message or "unknown")
    _print_labelled("hint:", CYAN, hint or _DEFAULT_HINT)


def print_diagnostic(line: str) -> None:
    """Write a line to stderr. A full disk or a reader that left there is no reason to stop the work."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class AnswerWriter:
    """Writes an answer to stdout piece by piece: to a terminal harmless and in whole words, elsewhere byte for byte.

    Args:
        reasoning: the stream for what the model thinks before it answers, dimmed and always harmless; None hides it.
    """

    def __init__(self, reasoning: TextIO | None = None) -> None:
        self._reasoning = reasoning
        self._answer_words = _word_wrapper(sys.stdout)
        self._reasoning_words = _word_wrapper(reasoning)
        self._at_line_start = self._reasoning_at_line_start = True

    def write(self, text: str, reasoning: str = "") -> None:
        """Write a piece, at once or when its last word is whole: first what was thought, then what is said."""
        if reasoning and self._reasoning is not None:
            if self._answer_words is not None and not self._at_line_start:  # it thinks again in the midst of the answer
                self._end_answer()
            self._reasoning_at_line_start = reasoning.endswith("\n")
            harmlessly = harmless(reasoning)
            words = self._reasoning_words
            self._write_reasoning(harmlessly if words is None else words.feed(harmlessly))
        if text:
            self._end_reasoning()
            self._at_line_start = text.endswith("\n")  # first, because Ctrl-C may come right after the writing
            self._write_answer(text if self._answer_words is None else self._answer_words.feed(harmless(text)))

    def end(self) -> None:
        """Finish the last line, if it is not."""
        self._end_reasoning()
        self._end_answer()

    def _end_answer(self) -> None:
        if not self._at_line_start:
            self._at_line_start = True
            self._write_answer(_last_word(self._answer_words) + "\n")

    def _end_reasoning(self) -> None:
        if not self._reasoning_at_line_start:
            self._reasoning_at_line_start = True
            self._write_reasoning(_last_word(self._reasoning_words), end="\n")

    def _write_answer(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def _write_reasoning(self, text: str, end: str = "") -> None:
        if self._reasoning is not None and text + end:
            with suppress(OSError):  # as in `print_diagnostic`: the answer matters
                print(colour(text, DIM, self._reasoning) if text else "", end=end, file=self._reasoning, flush=True)


def _word_wrapper(stream: TextIO | None) -> WordWrapper | None:
    """A wrapper for a terminal; None for any other stream."""
    return WordWrapper(lambda: terminal_columns(stream)) if stream is not None and is_terminal(stream) else None


def _last_word(words: WordWrapper | None) -> str:
    """The unfinished word; afterwards the wrapper is at the start of a line."""
    if words is None:
        return ""
    rest = words.finish()
    words.feed("\n")
    return rest


def decode_argument(text: str) -> str:
    """A text from the command line, which Python decoded as the locale says, as the UTF-8 that was typed.

    A byte order mark at its start is left out: "$(cat FILE)" brings it along.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text.encode("utf-8")  # no bytes were left over: the locale's decoding holds
    except UnicodeEncodeError:
        try:
            text = os.fsencode(text).decode("utf-8")
        except UnicodeError as exc:
            raise UsageError(f"{text!r} is not UTF-8 text", "pipe the text in as UTF-8") from exc
    return text.removeprefix(BOM)


def format_columns(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Rows in aligned columns. Nothing is cut: in a pipe lines are as long as they are.

    On a terminal that is too narrow the last column wraps; with too little room even for that, a row takes its own
    lines below its first cell.
    """
    columns = terminal_columns(sys.stdout) if is_terminal(sys.stdout) else None
    widths = [max(cell_width(cell) for cell in column) for column in zip(*rows, strict=True)]
    begin = indent + sum(width + _GAP for width in widths[:-1])
    if columns is not None and begin + widths[-1] >= columns:
        if columns - begin < _LEAST_LAST_COLUMN:
            return "\n".join(line for row in rows for line in _stack(row, indent, columns))
        rows = [(*row[:-1], _hang(row[-1], columns, begin)) for row in rows]
    lines = []
    for row in rows:
        padded = (cell + " " * (width - cell_width(cell)) for cell, width in zip(row[:-1], widths, strict=False))
        lines.append((" " * indent + (" " * _GAP).join([*padded, row[-1]])).rstrip())
    return "\n".join(lines)


def _stack(row: Sequence[str], indent: int, columns: int) -> list[str]:
    """A row of a table for which the terminal is too narrow."""
    first, *others = (cell for cell in row if cell) if any(row) else ("",)
    room = " " * (indent + _GAP)
    below = wrap_text(room + " · ".join(others), columns, room) if others else None
    return [wrap_text(" " * indent + first, columns, room), *([] if below is None else [below])]


def _hang(text: str, columns: int, begin: int) -> str:
    """A cell that begins in column `begin`, its further lines below its first."""
    return wrap_text(text, columns - begin).replace("\n", "\n" + " " * begin)


def print_lines(lines: Iterable[str]) -> None:
    """Lines of a result, on stdout; on a terminal harmless, and long ones broken between words."""
    text = "\n".join(lines)
    if is_terminal(sys.stdout):
        columns = terminal_columns(sys.stdout)
        text = "\n".join(wrap_text(line, columns, _own_indent(line)) for line in harmless(text).split("\n"))
    print(text, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """A result for programs, on stdout; harmless if that is a terminal."""
    text = json.dumps(document, ensure_ascii=False, indent=2)
    print(harmless(text) if is_terminal(sys.stdout) else text, flush=True)


def _own_indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" ")))


def _fitted(line: str, stream: TextIO, indent: str = "  ") -> str:
    """A line as it is; for a terminal, broken between words."""
    return wrap_text(line, terminal_columns(stream), indent) if is_terminal(stream) else line


def _print_labelled(label: str, sgr: str, text: str) -> None:
    line = _fitted(f"{label} {one_line(translate(text))}", sys.stderr)
    print_diagnostic(colour(label, sgr, sys.stderr) + line.removeprefix(label))


def is_verbose() -> bool:
    """True with --verbose or --debug."""
    return logging.getLogger("normistral").isEnabledFor(logging.INFO)


class WarningLines(logging.Handler):
    """Shows the package's log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        elif record.levelno == logging.INFO:
            say(record.getMessage())
        else:
            say(f"{record.name}: {record.getMessage()}")
