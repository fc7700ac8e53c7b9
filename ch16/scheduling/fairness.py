"""Fairness between tenants: Virtual Token Counter (Sheng et al., arXiv 2401.00588)."""

import heapq


class TokenCounters:
    """Virtual Token Counters: how much each tenant has been served, and who of those that wait has least.

    A tenant that comes back from idleness is lifted to the least of those that wait: nobody saves up.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: set[str] = set()
        self._heap: list[tuple[float, str]] = []  # entries that are not current are skipped
        self._level = 0.0  # of the tenant that was served last

    def join(self, tenant: str) -> None:
        """A tenant begins to wait."""
        level = self._served[self.least()] if self._active else self._level
        self._active.add(tenant)
        self._set(tenant, max(self._served.get(tenant, 0.0), level))

    def leave(self, tenant: str) -> None:
        """A tenant has nothing more that waits."""
        self._level = self._served[tenant]
        self._active.discard(tenant)
        if len(self._served) > 2 * len(self._active) + 64:  # who would be lifted anyway need not be remembered
            level = self._served[self.least()] if self._active else self._level
            keep = {name for name, served in self._served.items() if served > level}
            self._served = {name: self._served[name] for name in keep | self._active}

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served more."""
        self._set(tenant, self._served.get(tenant, self._level) + tokens)

    def least(self) -> str:
        """Of the tenants that wait, the one that was served least."""
        while (entry := self._heap[0])[1] not in self._active or self._served[entry[1]] != entry[0]:
            heapq.heappop(self._heap)
        return entry[1]

    def _set(self, tenant: str, served: float) -> None:
        self._served[tenant] = served
        if tenant in self._active:
            heapq.heappush(self._heap, (served, tenant))
            if len(self._heap) > 4 * len(self._active) + 64:
                self._heap = [(self._served[name], name) for name in self._active]
                heapq.heapify(self._heap)
