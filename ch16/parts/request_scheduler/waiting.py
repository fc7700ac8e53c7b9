"""A heap whose entries may leave from anywhere in it: cancelled and expired requests, not only the first."""

import heapq
from typing import Any

SLACK = 64  # entries of requests that have left, kept at most beside as many as wait


class WaitingHeap:
    """Requests by rank, then by `number` (arrival), as long as their `state` is "waiting".

    One that leaves is skipped when it comes up. When those that have left are half of the heap, they are removed.
    """

    def __init__(self) -> None:
        self.live = 0  # requests that wait
        self._entries: list[tuple[float, int, Any]] = []

    def push(self, rank: float, item: Any) -> None:
        """Let a request wait; a lower rank comes first."""
        heapq.heappush(self._entries, (rank, item.number, item))
        self.live += 1

    def first(self) -> Any:
        """The request that comes first and still waits; an IndexError if none does."""
        while (item := self._entries[0][2]).state != "waiting":
            heapq.heappop(self._entries)
        return item

    def left(self) -> None:
        """Count one request less, whose state has changed."""
        self.live -= 1
        if len(self._entries) > 2 * self.live + SLACK:
            self._entries = [entry for entry in self._entries if entry[2].state == "waiting"]
            heapq.heapify(self._entries)
