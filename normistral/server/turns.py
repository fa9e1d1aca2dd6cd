"""Places that a few may have at once; who waits for one gets it in turn, tenant by tenant."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A semaphore that goes round the tenants.

    Args:
        places: that may be taken at once.
        tenant_places: of these, by one tenant; None is all of them.
    """

    def __init__(self, places: int, tenant_places: int | None = None) -> None:
        self._free = places
        self._tenant_places = tenant_places or places
        self._taken: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant
        self._latest: dict[str, int] = {}  # number of the place that a tenant was given last
        self._given = 0

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Have a place while the context is open; the next one has it after a round of the event loop."""
        await self.take(tenant)
        try:
            yield
        finally:
            asyncio.get_running_loop().call_soon(self.give_back, tenant)

    async def take(self, tenant: str) -> None:
        """Wait for a place; it has to be given back."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(granted)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(tenant)
            else:
                self._leave(tenant, granted)
            raise

    def give_back(self, tenant: str) -> None:
        """Leave a place to the next."""
        self._free += 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._grant()

    def _grant(self) -> None:
        """Give what is free to those whose last turn is longest ago."""
        while self._free:
            entitled = [tenant for tenant in self._waiting if self._taken[tenant] < self._tenant_places]
            if not entitled:
                return
            tenant = min(entitled, key=lambda one: self._latest.get(one, 0))
            granted = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not granted.cancelled():
                self._free -= 1
                self._given += 1
                self._taken[tenant] += 1
                self._latest[tenant] = self._given
                granted.set_result(None)

    def _leave(self, tenant: str, granted: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(tenant, deque())
        if granted in waiting:
            waiting.remove(granted)
        if not waiting:
            self._waiting.pop(tenant, None)
