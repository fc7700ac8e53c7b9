"""A heap whose entries may leave from anywhere in it: cancelled and expired requests, not only the first."""

import heapq
from typing import Protocol

SLACK = 64  # entries of requests that have left, kept at most beside as many as wait


class Waiting(Protocol):
    """A request, as far as a heap looks at it."""

    number: int  # in order of arrival
    state: str  # "waiting" until it leaves


class WaitingHeap:
    """Requests by rank, then by arrival.

    One that leaves is skipped when it comes up. When those that have left are half of the heap, they are removed.
    """

    def __init__(self) -> None:
        self.live = 0  # requests that wait
        self._entries: list[tuple[float, int, Waiting]] = []

    def push(self, rank: float, item: Waiting) -> None:
        """Let a request wait; a lower rank comes first."""
        heapq.heappush(self._entries, (rank, item.number, item))
        self.live += 1

    def first(self) -> Waiting:
        """The request that comes first and still waits.

        Raises:
            IndexError: no request waits.
        """
        while (item := self._entries[0][2]).state != "waiting":
            heapq.heappop(self._entries)
        return item

    def left(self) -> None:
        """Count one request less, whose state has changed."""
        self.live -= 1
        if len(self._entries) > 2 * self.live + SLACK:
            self._entries = [entry for entry in self._entries if entry[2].state == "waiting"]
            heapq.heapify(self._entries)
