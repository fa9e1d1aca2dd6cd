"""Files that are written whole or not at all, and a lock that the operating system lets go of when its holder dies."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

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
