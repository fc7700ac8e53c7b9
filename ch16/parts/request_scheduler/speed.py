"""How fast is the scheduler, beside the queue of the standard library?"""

import queue
import time
from collections.abc import Callable
from typing import Any

from common.results import Column

SPEED_COLUMNS = (
    Column("what", "add and take, batches of 32"),
    Column("depth", "requests waiting", ",d"),
    Column("pairs_per_s", "pairs/s", ",.0f"),
    Column("ratio", "over PriorityQueue", ".2f"),
)
BATCH = 32


def pairs_per_s(add: Callable[[int], object], take: Callable[[], object], depth: int, pairs: int) -> float:
    """Adds and takes a second while about `depth` requests wait.

    Args:
        add: lets a request wait; it gets a number.
        take: takes BATCH of them.
        pairs: requests that are added and taken, a multiple of BATCH.
    """
    for i in range(depth):
        add(i)
    started = time.perf_counter()
    for i in range(0, pairs, BATCH):
        for j in range(i, i + BATCH):
            add(j)
        take()
    return pairs / (time.perf_counter() - started)


def speed_rows(make: Callable[[bool, int], Any], pairs: int) -> list[dict]:
    """Rows of SPEED_COLUMNS: schedulers that `make(fair, max_queue)` makes, and a bare PriorityQueue of numbers.

    Args:
        pairs: requests that each adds and takes at each depth, a multiple of BATCH.
    """
    rows = []
    for depth in (100, 10_000, 100_000):
        bare: queue.PriorityQueue = queue.PriorityQueue()
        base = pairs_per_s(
            lambda i, bare=bare: bare.put((i * 7919 % 20, i)),
            lambda bare=bare: [bare.get() for _ in range(BATCH)],
            depth,
            pairs,
        )
        rows.append({"what": "queue.PriorityQueue", "depth": depth, "pairs_per_s": base, "ratio": 1.0})
        for what, fair in (("InferenceScheduler", False), ("the same, fair, 10 tenants", True)):
            ours = make(fair, 2 * (depth + pairs))
            add = [
                lambda i, ours=ours: ours.add_request(None, i * 7919 % 20),
                lambda i, ours=ours: ours.add_request(None, i * 7919 % 20, tenant=f"t{i % 10}"),
            ][fair]
            speed = pairs_per_s(add, lambda ours=ours: ours.get_next_batch(BATCH), depth, pairs)
            rows.append({"what": what, "depth": depth, "pairs_per_s": speed, "ratio": speed / base})
    return rows
