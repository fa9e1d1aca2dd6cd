"""How many connections the limit of open files allows (`ulimit -n`, getrlimit(2))."""

from __future__ import annotations

import sys
from typing import NamedTuple

from normistral.errors import UsageError

_OWN = 32  # standard streams, event loop, listener, pipes to workers, files that are read in passing
_SPARE_SHARE, _HELD_SHARE = 8, 4  # of all descriptors, one in so many at least
_MOST_SPARE = 64
_MOST_HELD = 1024
_LEAST = 8


class ConnectionPlan(NamedTuple):
    """Sockets that a server may hold at once.

    Attributes:
        served: connections whose requests are answered.
        spare: more that are told that there are too many.
        held: more whose request has not come, or needs no key.
    """

    served: int
    spare: int
    held: int


def plan_connections(wanted: int) -> ConnectionPlan:
    """Raise the soft limit of open files to the hard one, and divide what it gives.

    Args:
        wanted: connections to serve; the plan has fewer where the limit does not allow as many.

    Raises:
        UsageError: it hardly allows any.
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
    """The limit of open files in force from now on; None where there is none."""
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
