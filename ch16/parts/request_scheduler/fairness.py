"""Fairness between tenants: Virtual Token Counter (Sheng et al., arXiv 2401.00588, algorithm 2)."""

import heapq

SLACK = 64  # outdated entries, or tenants that left, kept at most beside as many as wait


class TokenCounters:
    """How many tokens each tenant has been served, and which waiting tenant was served least.

    A tenant that returns from idleness is lifted to the least of the waiting tenants; if none waits, to the last that
    did. So idle time earns no credit. Of equal tenants the one that has waited longer goes first.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._since: dict[str, int] = {}  # waiting tenants, numbered as they began to wait
        self._heap: list[tuple[float, int, str]] = []  # entries that are not current are skipped
        self._last: str | None = None  # that stopped waiting
        self._joined, self._prune_at = 0, SLACK

    def join(self, tenant: str) -> None:
        """A tenant begins to wait."""
        level = self._level()
        self._since[tenant] = self._joined
        self._joined += 1
        self._set(tenant, max(self._served.get(tenant, 0.0), level))

    def leave(self, tenant: str) -> None:
        """A tenant that waited has no more waiting requests."""
        del self._since[tenant]
        self._last = tenant
        if len(self._served) > self._prune_at + 2 * len(self._since):
            # A tenant that would be lifted anyway need not be remembered.
            level = self._level()
            keep = {name for name, served in self._served.items() if served > level} | {*self._since, tenant}
            self._served = {name: self._served[name] for name in keep}
            self._prune_at = max(SLACK, 2 * len(keep))

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served `tokens` more, whether it waits or not."""
        known = self._served.get(tenant)
        self._set(tenant, (self._level() if known is None else known) + tokens)

    def least(self) -> str:
        """The waiting tenant that was served least; an IndexError if none waits."""
        while not self._current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def _level(self) -> float:
        if self._since:
            return self._served[self.least()]
        return 0.0 if self._last is None else self._served[self._last]

    def _current(self, entry: tuple[float, int, str]) -> bool:
        served, since, tenant = entry
        return self._since.get(tenant) == since and self._served[tenant] == served

    def _set(self, tenant: str, served: float) -> None:
        self._served[tenant] = served
        if (since := self._since.get(tenant)) is not None:
            heapq.heappush(self._heap, (served, since, tenant))
            if len(self._heap) > 4 * len(self._since) + SLACK:
                self._heap = [(self._served[name], number, name) for name, number in self._since.items()]
                heapq.heapify(self._heap)
