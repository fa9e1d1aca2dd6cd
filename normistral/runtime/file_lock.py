"""A lock that the operating system lets go of when its holder dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this name; its file is there while the context is open.

    Raises:
        BlockingIOError: another process or thread holds it.
        OSError: the file cannot be made.
    """
    file = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _take(path: Path) -> IO[bytes]:
    while True:
        file = path.open("ab")
        try:
            _lock(file.fileno())
            # The holder before us may have removed the name between our open and our lock: then this is nobody's lock.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as exc:
            raise BlockingIOError(exc.errno, exc.strerror) from exc
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
