"""Ctrl-C in the midst of libraries that do not pass it on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_win() -> Iterator[None]:
    """An error that follows a Ctrl-C in this block is that Ctrl-C.

    transformers makes its attention masks under torch's vmap, which turns a KeyboardInterrupt that comes just there
    into a RuntimeError ("NYI: querying is_contiguous inside of vmap").
    """
    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else handles it, or it is ignored
        return
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as exc:
        if pressed.is_set():
            raise KeyboardInterrupt from exc
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
