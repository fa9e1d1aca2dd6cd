"""Results that the command line writes to a file: whole or not at all, or into what a shell gave for one.

A result may go to a descriptor of this process by its name (/dev/stdout, and /dev/fd/N as a shell's `>(…)` is), to
/dev/null, or to a FIFO of this user that somebody reads; those are written to as they are. Any other name is
`normistral.files`' business.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from normistral.commands.console import print_json, print_lines
from normistral.errors import NormistralError, UsageError
from normistral.files import RefusedFileError, atomic_write, checked, descriptor_number, explain, is_own, require_place


def require_result_place(path: Path, option: str) -> None:
    """Find out before long work whether `write_result` can write there.

    Args:
        option: that names it, for the message.

    Raises:
        UsageError: it cannot.
    """
    if descriptor_number(path) is None and not _is_stream(path):
        require_place(path, option)


def require_distinct(files: Mapping[str, Path | None]) -> None:
    """Refuse two options that name one file: a result would be written over a text, or over another result.

    Args:
        files: by their options; None is one that was not given.

    Raises:
        UsageError: two of them are the same file.
    """
    named = [(option, path) for option, path in files.items() if path is not None]
    for (option, path), (other, second) in combinations(named, 2):
        if os.path.realpath(path) == os.path.realpath(second):
            raise UsageError(f"{other} and {option} both name {path}", "take two names")


def show_result(document: dict[str, Any], lines: Iterable[str], json_file: str | None) -> None:
    """Print a result as lines, and write it as JSON if a file is named: - is stdout, without the lines.

    Raises:
        NormistralError: as `write_result`.
    """
    if json_file == "-":
        print_json(document)
        return
    print_lines(lines)
    if json_file is not None:
        write_result(Path(json_file), json.dumps(document, ensure_ascii=False, indent=2) + "\n")


def write_result(path: Path, text: str) -> None:
    """Write a text in UTF-8, for anybody to read; bytes of a name in it that are no UTF-8 become question marks.

    Raises:
        NormistralError: it cannot be written. Nothing is left of it, and a file of that name is as it was.
    """
    raw = text.encode(errors="replace")
    try:
        number = descriptor_number(path)
        if number is not None:
            _write(os.dup(number), raw)
        elif _is_stream(path):
            _write(_open_stream(path), raw)
        else:
            with atomic_write(path, private=False) as file:
                file.write(raw)
    except BrokenPipeError:
        raise  # nobody reads any more: the command line ends quietly
    except OSError as exc:
        reason, hint = explain(exc)
        raise NormistralError(f"cannot write {path}: {reason}", hint) from exc


def _is_stream(path: Path) -> bool:
    """True for a FIFO of this user, and for /dev/null."""
    try:
        status = checked(path).lstat()
    except OSError:
        return False
    if stat.S_ISFIFO(status.st_mode):
        return is_own(status)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev


def _open_stream(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if not path.is_fifo():
            raise
        raise RefusedFileError(path, "it is a FIFO that nobody reads", "start its reader first") from exc
    os.set_blocking(descriptor, True)
    return descriptor


def _write(descriptor: int, raw: bytes) -> None:
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(raw)
