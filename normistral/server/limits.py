"""Limits of a server and their defaults; connections by open files (`ulimit -n`, getrlimit(2)) and their eviction."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

from normistral.errors import UsageError
from normistral.runtime.overflow import OVERFLOW, Overflow, require_overflow

KIB, MIB, GIB = 2**10, 2**20, 2**30
LINGER_S = 2.0  # for the sender of a refused request to read that, before a reset takes it away
_OWN = 32  # standard streams, event loop, listener, pipes to workers, files that are read in passing
_SPARE_SHARE, _HELD_SHARE = 8, 4  # of all descriptors, one in so many at least
_MOST_SPARE = 64
_MOST_HELD = 1024
_LEAST = 8
_PATIENCE_S = 1.0  # that nobody is sent away for


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of one server.

    Attributes:
        body_bytes: of a request's body; refused with 413 before more is read.
        header_bytes: of a request's line and headers.
        json_depth: how deep arrays and objects of a body may nest.
        json_members: of one object of a body.
        json_values: of a whole body.
        json_containers: arrays and objects of a whole body; each costs as much as a dozen plain values.
        choices: the most that `n` may be.
        context: tokens of prompt and answer together; None is the model's own context.
        new_tokens: of one answer; None is as many as fit.
        jobs: answers of all callers that wait or are being written; one more is refused with 429.
        tenant_jobs: of these, one caller's.
        connections: open at once. One more takes the place of that which has kept the server waiting longest, or is
            refused with 503.
        header_s: for a request's headers to arrive.
        body_s: for its body.
        queue_s: until an answer begins to be computed; then 503.
        request_s: until it is whole; then 503, or an error event in a stream.
        stall_s: that what was written may wait to be taken, and a second more for 16 KiB; then the connection is cut.
        keep_alive_s: between two requests.
        backlog: steps that may wait for a reader, beyond what the system's buffers hold; then likewise.
        grace_s: for answers under way once the server is told to stop.
        overflow: of requests that do not say what to do where a conversation is longer than the context.
    """

    body_bytes: int = MIB
    header_bytes: int = 32 * KIB
    json_depth: int = 64
    json_members: int = 1024
    json_values: int = 100_000
    json_containers: int = 4096
    choices: int = 8
    context: int | None = None
    new_tokens: int | None = None
    jobs: int = 128
    tenant_jobs: int = 64
    connections: int = 256
    header_s: float = 10.0
    body_s: float = 20.0
    queue_s: float = 120.0
    request_s: float = 900.0
    stall_s: float = 30.0
    keep_alive_s: float = 30.0
    backlog: int = 1024
    grace_s: float = 30.0
    overflow: Overflow = OVERFLOW

    def __post_init__(self) -> None:
        """Raises UsageError for a limit below 1, or no policy."""
        require_overflow(self.overflow)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not isinstance(value, str):
                require_above_zero(field.name, value)

    def context_of(self, context_length: int) -> int:
        """Tokens that prompt and answer may take together on a model with this context."""
        return context_length if self.context is None else min(self.context, context_length)


def require_above_zero(name: str, value: float) -> None:
    """Raise UsageError for a limit that is not above 0, or no number."""
    if not value > 0:
        raise UsageError(f"the limit {name} must be above 0, not {value}", "leave it out for the default")


class ConnectionPlan(NamedTuple):
    """Division of the file descriptors among connections.

    Attributes:
        served: connections with requests for the application.
        spare: further ones, answered with 503.
        held: connections without a request, or with requests that need no key.
    """

    served: int
    spare: int
    held: int


def plan_connections(wanted: int) -> ConnectionPlan:
    """Raise the soft limit of open files to the hard limit, and divide it.

    Args:
        wanted: connections to serve; the plan has fewer where the limit does not allow as many.

    Raises:
        UsageError: it leaves fewer than 8 connections.
    """
    limit = _raise_limit()
    if limit is None:
        return ConnectionPlan(wanted, _MOST_SPARE, _MOST_HELD)
    spare = min(_MOST_SPARE, limit // _SPARE_SHARE)
    allowed = limit - _OWN - spare - limit // _HELD_SHARE
    if allowed < _LEAST:
        raise UsageError(f"the limit of {limit} open files leaves no room for connections", "raise it: ulimit -n 1024")
    served = min(wanted, allowed)
    return ConnectionPlan(served, spare, min(_MOST_HELD, limit - _OWN - served - spare))


def _raise_limit() -> int | None:
    """Raise the limit of open files; returns the new one, or None for unlimited."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS has a lower limit than it says
            pass
    return None if soft == resource.RLIM_INFINITY else soft


class PoolMember(Protocol):
    """Connection of a `ConnectionPool`."""

    def leave(self) -> None:
        """Close without waiting for the peer."""
        ...


class ConnectionPool:
    """Admission and eviction of connections; a connection that waits for its client may be evicted.

    Args:
        served: most connections with requests for the application.
        spare: further ones, answered with 503.
    """

    def __init__(self, served: int, spare: int) -> None:
        self._served, self._spare = served, spare
        self._waiting: dict[PoolMember, float] = {}  # since when; who has waited longest comes first
        self._surplus: dict[PoolMember, None] = {}  # in the order in which they came
        self._leaving: set[PoolMember] = set()

    def admit(self, member: PoolMember, count: int) -> bool:
        """Admit a connection, if need be in place of the one that has waited longest for its client.

        Returns False for a surplus connection, which is answered with 503.

        Args:
            count: connections that are open, with this one.
        """
        if count - len(self._surplus) - len(self._leaving) <= self._served:
            return True
        longest, since = next(iter(self._waiting.items()), (None, 0.0))
        if longest is not None and time.monotonic() - since > _PATIENCE_S:
            self._evict(longest)
            return True
        if len(self._surplus) >= self._spare:
            self._evict(next(iter(self._surplus)))
        self._surplus[member] = None
        return False

    def mark_waiting(self, member: PoolMember) -> None:
        """Mark a connection as waiting for its client."""
        if member not in self._surplus:
            self._waiting.pop(member, None)
            self._waiting[member] = time.monotonic()

    def mark_busy(self, member: PoolMember) -> None:
        """Mark a connection as busy: not evicted."""
        self._waiting.pop(member, None)

    def remove(self, member: PoolMember) -> None:
        """Remove a closed connection."""
        self._forget(member)
        self._leaving.discard(member)

    def _evict(self, member: PoolMember) -> None:
        self._forget(member)
        self._leaving.add(member)
        member.leave()

    def _forget(self, member: PoolMember) -> None:
        self._waiting.pop(member, None)
        self._surplus.pop(member, None)
