"""Interpreter exit while threads compute: waits for native code, closes models.

A daemon thread that comes back from native code to an interpreter that has ended is unwound there, through frames of
C++ that do not allow it, and the process aborts ("terminate called without an active exception", status 134). So
running computations are counted, cancelled and waited for before.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of an iterator."""


_END = _End()

_POLL_S = 0.002
_CANCEL_S = 2.0
_MOST_S = 60.0  # a forward, or compiling a model
_lock = threading.Lock()
_computing = 0


class Closable(Protocol):
    """An object that computes until it is closed."""

    def cancel(self) -> None:
        """Ask running computations to end soon."""
        ...

    def close(self) -> None:
        """Stop what is running."""
        ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(closable: Closable) -> None:
    """Close the object before the interpreter ends, if it still exists.

    The interpreter calls first what was registered last, so this comes before what the engine registered.
    """
    _open.add(closable)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


@contextmanager
def computing() -> Iterator[None]:
    """The interpreter does not end while the context is open in a thread, but for a minute at most."""
    global _computing
    with _lock:
        _computing += 1
    try:
        yield
    finally:
        with _lock:
            _computing -= 1


def computing_each(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items, each made in such a context."""
    with closing(items):
        while True:
            with computing():
                item = next(items, _END)
            if isinstance(item, _End):
                return
            yield item


def _close_all() -> None:
    for closable in list(_open):
        closable.cancel()
    _wait_until_idle(_CANCEL_S)  # a thread that waits for its turn would raise ClosedError to its user
    for closable in list(_open):
        closable.close()
    _wait_until_idle(_MOST_S)


def _wait_until_idle(most_s: float) -> None:
    deadline = time.monotonic() + most_s
    while _computing and time.monotonic() < deadline:
        time.sleep(_POLL_S)
