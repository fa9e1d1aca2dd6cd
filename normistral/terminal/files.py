"""Text files of the command line that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from normistral.files import replacing


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, for anybody to read.

    Raises:
        OSError: it cannot be written; nothing is left of it, and a file of that name is as it was.
    """
    with replacing(path, private=False) as file:
        file.write(text.encode())
