"""How text gets to the terminal: answers on stdout, all else on stderr, one `error:` and one `hint:` line.

It knows nothing of models; and nothing heavy, so that errors and the help come at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from normistral.errors import NormistralError, UsageError
from normistral.text_input import BOM, decode_text

DIM, RED, YELLOW, CYAN = "2", "1;31", "33", "36"  # SGR parameters (ECMA-48, 8.3.117)

NO_STDOUT = "stdout is closed: there is nowhere to write the result"
STDOUT_HINT = "send it somewhere, such as > FILE, or > /dev/null"
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
    """Whether an empty write gets through; a stream without a descriptor takes everything."""
    try:
        os.write(stream.fileno(), b"")
    except (OSError, ValueError) as exc:
        return isinstance(exc, ValueError) or exc.errno != errno.EBADF
    return True


def drop_stdout() -> None:
    """Let what is still to be written go nowhere, or the interpreter complains when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at this stream (or types into it)."""
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
    print_diagnostic(colour(one_line(text), DIM, sys.stderr))


def warn(text: str) -> None:
    """One `warning:` line on stderr."""
    print_diagnostic(f"{colour('warning:', YELLOW, sys.stderr)} {one_line(text)}")


def print_error(message: str, hint: str) -> None:
    """One `error:` line and one `hint:` line on stderr."""
    print_diagnostic(
        f"{colour('error:', RED, sys.stderr)} {one_line(message) or 'unknown'}\n"
        f"{colour('hint:', CYAN, sys.stderr)} {one_line(hint) or _DEFAULT_HINT}"
    )


def print_diagnostic(line: str) -> None:
    """Write a line to stderr. A full disk or a reader that left there is no reason to stop the work."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def show_error(error: NormistralError) -> None:
    """Print an error of the package."""
    print_error(error.message, error.hint)


class AnswerWriter:
    """Writes an answer to stdout piece by piece, harmless if stdout is a terminal and byte for byte if it is not.

    Args:
        reasoning: the stream for what the model thinks before it answers, dimmed and always harmless; None hides it.
    """

    def __init__(self, reasoning: TextIO | None = None) -> None:
        self._terminal = is_terminal(sys.stdout)
        self._reasoning = reasoning
        self._at_line_start = self._reasoning_at_line_start = True

    def write(self, text: str, reasoning: str = "") -> None:
        """Write a piece, at once: first what was thought, then what is said."""
        if reasoning and self._reasoning is not None:
            if self._terminal and not self._at_line_start:  # it thinks again in the midst of the answer
                self.write("\n")
            self._reasoning_at_line_start = reasoning.endswith("\n")
            print(colour(harmless(reasoning), DIM, self._reasoning), end="", file=self._reasoning, flush=True)
        if text:
            self._end_reasoning()
            self._at_line_start = text.endswith("\n")  # first, because Ctrl-C may come right after the writing
            sys.stdout.write(harmless(text) if self._terminal else text)
            sys.stdout.flush()

    def end(self) -> None:
        """Finish the last line, if it is not."""
        self._end_reasoning()
        if not self._at_line_start:
            self.write("\n")

    def _end_reasoning(self) -> None:
        if not self._reasoning_at_line_start:
            self._reasoning_at_line_start = True
            print(file=self._reasoning, flush=True)


def read_piped_prompt() -> str | None:
    """What is piped into stdin, without `echo`'s line end; None if stdin is a terminal or closed.

    Raises:
        UsageError: it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    text = decode_text(sys.stdin.buffer.read(), "the input")
    return text.removesuffix("\n").removesuffix("\r")


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
    """Rows in aligned columns; nothing is cut, so that a pipe gets whole names."""
    widths = [max(_width(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append((" " * indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def print_lines(lines: Iterable[str]) -> None:
    """Lines of a result, on stdout; harmless if that is a terminal."""
    text = "\n".join(lines)
    print(harmless(text) if is_terminal(sys.stdout) else text, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """A result for programs, on stdout; harmless if that is a terminal."""
    print_lines([json.dumps(document, ensure_ascii=False, indent=2)])


class WarningLines(logging.Handler):
    """Shows the package's log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        else:
            say(f"{record.name}: {record.getMessage()}")


def _width(text: str) -> int:
    """Terminal cells that `text` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.combining(character) != 0 for character in text)
    return len(text) + wide - marks
