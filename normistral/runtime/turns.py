"""What cannot be done twice at once is refused, and not queued."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from normistral.errors import BusyError


class OneAtATime:
    """Lets one user in; the others are told to wait.

    Args:
        message, hint: of the `BusyError` that they get.
    """

    def __init__(self, message: str, hint: str) -> None:
        self._message, self._hint = message, hint
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else gets in while the context is open; raises BusyError if somebody is."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(self._message, self._hint)
        try:
            yield
        finally:
            self._lock.release()

    def require_idle(self) -> None:
        """Raise BusyError if somebody is in."""
        if self._lock.locked():
            raise BusyError(self._message, self._hint)
