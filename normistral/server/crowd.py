"""Which connection has to go when there are more than are served: the one that has kept the server waiting longest."""

from __future__ import annotations

import time
from typing import Protocol

_PATIENCE_S = 1.0  # that nobody is sent away for


class Guest(Protocol):
    """A connection."""

    def leave(self) -> None:
        """End at once."""
        ...


class Crowd:
    """Connections that wait for their clients: for a request, for more of it, or for an answer to be taken.

    Args:
        served: connections that are answered.
        spare: more that are told that there are too many.
    """

    def __init__(self, served: int, spare: int) -> None:
        self._served, self._spare = served, spare
        self._waiting: dict[Guest, float] = {}  # since when; who has waited longest comes first
        self._surplus: dict[Guest, None] = {}  # in the order in which they came
        self._leaving: set[Guest] = set()

    def admit(self, guest: Guest, count: int) -> bool:
        """Whether a new connection is served, in the place of one that has waited long if need be.

        Otherwise it is one too many, and may only be told so.

        Args:
            count: connections that are open, with this one.
        """
        if count - len(self._surplus) - len(self._leaving) <= self._served:
            return True
        longest, since = next(iter(self._waiting.items()), (None, 0.0))
        if longest is not None and time.monotonic() - since > _PATIENCE_S:
            self._send_away(longest)
            return True
        if len(self._surplus) >= self._spare:
            self._send_away(next(iter(self._surplus)))
        self._surplus[guest] = None
        return False

    def wait(self, guest: Guest) -> None:
        """From now on it keeps the server waiting."""
        if guest not in self._surplus:
            self._waiting.pop(guest, None)
            self._waiting[guest] = time.monotonic()

    def busy(self, guest: Guest) -> None:
        """It keeps the server waiting no more."""
        self._waiting.pop(guest, None)

    def gone(self, guest: Guest) -> None:
        """It has ended."""
        self._forget(guest)
        self._leaving.discard(guest)

    def _send_away(self, guest: Guest) -> None:
        self._forget(guest)
        self._leaving.add(guest)
        guest.leave()

    def _forget(self, guest: Guest) -> None:
        self._waiting.pop(guest, None)
        self._surplus.pop(guest, None)
