"""Interrupts and interpreter exit while threads compute: locks stay free, native code is waited for, models are closed.

A daemon thread that comes back from native code to an interpreter that has ended is unwound there, through frames of
C++ that do not allow it, and the process aborts ("terminate called without an active exception", status 134). So
running computations are counted, cancelled and waited for before.

A forked child has the models of its parent without the engines' threads. Closing or freeing one there waits for these
threads for good, so the child never does; nor does it wait for the computations of the parent's threads.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Protocol, TypeVar

T = TypeVar("T")


_POLL_S = 0.002
_CANCEL_S = 2.0
_MOST_S = 60.0  # a forward, or compiling a model
# Thread -> contexts that it has open. Each thread changes its own entry only, so no lock is needed, and an interrupt in
# the main thread between counting and opening a context leaves no count that others wait for.
_computing: dict[int, int] = {}


class InterruptSafeLock(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """Lock for `with` that an interrupt (Ctrl-C) does not leave locked.

    From Python 3.14 on, KeyboardInterrupt may be raised when `with` has taken a lock and before the block that
    releases it. That is likely where threads wait for the lock; every later forward, and the end of the program, then
    waits for good. A reentrant lock knows whether this thread holds it. `__exit__` has to stay the one in C: a method
    in Python may be interrupted before its first line.
    """

    def __enter__(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock; it is free again where this is interrupted."""
        try:
            return self.acquire(blocking, timeout)
        except BaseException:
            with suppress(RuntimeError):  # not taken yet
                self.release()
            raise


class Closable(Protocol):
    """An object that computes until it is closed."""

    def cancel(self) -> None:
        """Ask running computations to end soon."""

    def close(self) -> None:
        """Stop what is running."""


_open: weakref.WeakValueDictionary[int, Closable] = weakref.WeakValueDictionary()


def close_at_exit(closable: Closable) -> None:
    """Close the object before the interpreter ends, if it still exists.

    The interpreter calls first what was registered last, so this comes before what the engine registered.
    """
    _open[id(closable)] = closable
    atexit.unregister(_close_all)
    atexit.register(_close_all)


@contextmanager
def computing() -> Iterator[None]:
    """The interpreter does not end while the context is open in a thread, but for a minute at most."""
    thread = threading.get_ident()
    _computing[thread] = _computing.get(thread, 0) + 1
    try:
        yield
    finally:
        if _computing[thread] == 1:
            del _computing[thread]
        else:
            _computing[thread] -= 1


def computing_each(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items, each made in such a context."""
    with closing(items):
        while True:
            with computing():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


_inherited: list[Closable] = []


def is_inherited(closable: Closable) -> bool:
    """Whether another process made this, of which this one is a fork."""
    return any(one is closable for one in _inherited)


def _keep_inherited() -> None:
    """In a forked child: nothing of the parent's is closed, or freed when the interpreter ends."""
    for closable in _still_open():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(closable))  # the list itself is freed then
        _inherited.append(closable)
    _open.clear()
    _computing.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_inherited)


def _close_all() -> None:
    for closable in _still_open():
        closable.cancel()
    _wait_until_idle(_CANCEL_S)  # a thread that waits for its turn would raise ClosedError to its user
    for closable in _still_open():
        closable.close()
    _wait_until_idle(_MOST_S)


def _still_open() -> list[Closable]:
    """Those that exist. Another thread may load one meanwhile, so this must not iterate over `_open` itself."""
    return [closable for reference in _open.valuerefs() if (closable := reference()) is not None]


def _wait_until_idle(most_s: float) -> None:
    """Wait for the other threads; this one does not compute."""
    deadline, this_thread = time.monotonic() + most_s, threading.get_ident()
    while _computing.keys() - {this_thread} and time.monotonic() < deadline:
        time.sleep(_POLL_S)
