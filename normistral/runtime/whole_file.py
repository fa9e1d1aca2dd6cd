"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from normistral.errors import NormistralError


@contextmanager
def replacing(path: Path, *, private: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the context ends without an error.

    Until then it is a neighbour, and `path` is as it was.

    Args:
        private: with permissions 0600; otherwise with those of any new file.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")  # permissions 0600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if not private:
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def saving(path: Path) -> Iterator[BinaryIO]:
    """`replacing` for what somebody wrote and named a place for: readable by its owner only.

    Raises:
        NormistralError: it cannot be written.
    """
    try:
        with replacing(path) as stream:
            yield stream
    except OSError as exc:
        raise NormistralError(f"cannot write {path}: {exc.strerror}", "save it elsewhere") from exc
