"""Files that hold what somebody wrote: readable by their owner only, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from normistral.errors import NormistralError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file with permissions 0600 that takes the place of `path` when the context ends without an error.

    Until then it is a neighbour, and `path` is as it was.

    Raises:
        NormistralError: it cannot be written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # permissions 0600
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise NormistralError(f"cannot write {path}: {exc.strerror}", "save it elsewhere") from exc
