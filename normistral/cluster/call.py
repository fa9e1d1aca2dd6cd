"""A request on its way from the front to a replica, and what comes back: plain data, because it crosses processes."""

from __future__ import annotations

from typing import NamedTuple

Headers = list[tuple[bytes, bytes]]


class Call(NamedTuple):
    """A request whose body has been read."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class Start(NamedTuple):
    """What a replica sends first; pieces of the body follow."""

    status: int
    headers: Headers
