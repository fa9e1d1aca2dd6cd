"""UTF-8 text from files and pipes; byte order marks and other encodings are recognised here alone."""

from __future__ import annotations

import codecs
from pathlib import Path

from normistral.errors import UsageError
from normistral.files import explain, read_input

BOM = "\ufeff"
_FOREIGN_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_MOST_BYTES = 2**32
_SHORTEST_GUESS = 4  # bytes; fewer say nothing of an encoding


def decode_text(raw: bytes, what: str) -> str:
    """UTF-8 bytes as text, without one byte order mark at the start.

    Args:
        what: the name of the source in messages: "the input", a path.

    Raises:
        UsageError: they are not UTF-8; the message names the encoding they look like.
    """
    if encoding := _foreign_encoding(raw):
        raise UsageError(f"{what} is {encoding}, not UTF-8", _convert_from(encoding))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        start = exc.start + (len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0)
        raise UsageError(
            f"{what} is not UTF-8: byte 0x{raw[start]:02x} at position {start}", _convert_from("latin1")
        ) from exc


def read_text_file(path: Path, hint: str, option: str = "", most: int = _MOST_BYTES) -> str:
    """The text of a UTF-8 file of at most `most` bytes, without a byte order mark; line ends as they are.

    Args:
        hint: of the error where the file cannot be read.
        option: that names it, for messages.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    what = f"{option} {path}" if option else str(path)
    try:
        raw = read_input(path, most)
    except OSError as exc:
        raise UsageError(f"cannot read {what}: {explain(exc)[0]}", hint) from exc
    return decode_text(raw, what)


def _foreign_encoding(raw: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark, or by the zero bytes of text in Latin letters without one."""
    marked = next((name for mark, name in _FOREIGN_MARKS.items() if raw.startswith(mark)), None)
    if marked is not None or len(raw) < _SHORTEST_GUESS:
        return marked
    for start, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        halves = raw[start::2]
        if 2 * halves.count(0) > len(halves) and not raw[1 - start :: 2].count(0):
            return name
    return None


def _convert_from(encoding: str) -> str:
    return f"convert it, such as with: iconv -f {encoding.lower()} -t utf-8"
