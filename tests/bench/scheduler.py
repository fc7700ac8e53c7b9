"""What does the scheduler cost beside the queue of the standard library? (`make bench-scheduler`)

One thread adds and takes requests in batches of 32 while others wait: by `queue.PriorityQueue`, by
`InferenceScheduler`, and by the same with fairness between ten tenants. They take turns, round after round; ratios are
within a round. Adding and taking cost O(log n), so the ratio should hardly depend on how many requests wait.

    python3 tests/bench/scheduler.py --json results/cpu/bench_scheduler.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import queue
import statistics
import time
from collections.abc import Callable

from ch16.request_scheduler import InferenceScheduler
from common import cli
from common.gpu import detect
from common.results import Column, Report

TARGETS = {"pairs_per_s": (200_000, ">="), "ratio": (0.5, ">=")}
COLUMNS = (
    Column("what", "add and take"),
    Column("depth", "requests waiting", ",d"),
    Column("pairs_per_s", "pairs/s", ",.0f"),
    Column("ratio", "vs. PriorityQueue", ".2f"),
    Column("low", "lowest", ".2f"),
    Column("high", "highest", ".2f"),
)
BATCH = 32
BARE, AGEING, FAIR = "queue.PriorityQueue", "InferenceScheduler", "the same, fair, 10 tenants"


def bare(size: int) -> tuple[Callable[[int], object], Callable[[], object]]:
    """How to add the i-th request to a PriorityQueue, and how to take BATCH of them."""
    waiting: queue.PriorityQueue = queue.PriorityQueue(size)
    return lambda i: waiting.put((i * 7919 % 20, i)), lambda: [waiting.get() for _ in range(BATCH)]


def ageing(size: int) -> tuple[Callable[[int], object], Callable[[], object]]:
    """The same for a scheduler."""
    scheduler = InferenceScheduler(ageing_s=1.0, max_queue=size)
    return lambda i: scheduler.add_request(None, i * 7919 % 20), lambda: scheduler.get_next_batch(BATCH)


def fair(size: int) -> tuple[Callable[[int], object], Callable[[], object]]:
    """The same for a scheduler that is fair to ten tenants."""
    scheduler = InferenceScheduler(ageing_s=1.0, fair=True, max_queue=size)
    add = lambda i: scheduler.add_request(None, i * 7919 % 20, tenant=f"t{i % 10}")  # noqa: E731
    return add, lambda: scheduler.get_next_batch(BATCH)


def pairs_per_s(add: Callable[[int], object], take: Callable[[], object], depth: int, pairs: int) -> float:
    """Adds and takes per second while about `depth` requests wait.

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


def rows_of(depth: int, pairs: int, rounds: int) -> list[dict]:
    """Rows of COLUMNS at one depth: medians over the rounds, the lowest and the highest ratio."""
    makers, size = {BARE: bare, AGEING: ageing, FAIR: fair}, 2 * (depth + pairs)
    turns = [{what: pairs_per_s(*make(size), depth, pairs) for what, make in makers.items()} for _ in range(rounds)]
    rows = []
    for what in makers:
        ratios = [turn[what] / turn[BARE] for turn in turns]
        row = {"what": what, "depth": depth, "pairs_per_s": statistics.median(turn[what] for turn in turns)}
        rows.append(row | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)})
    return rows


def main() -> int:
    """Measure at three depths, print the figures beside their targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="default: 5")
    parser.add_argument("--batches", type=cli.positive_int, default=1000, help="of 32 pairs a round; default: 1,000")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()

    report = Report("tests/bench/scheduler.py", detect("cpu"), {"rounds": args.rounds, "batches": args.batches})
    report.print_card()
    rows = [row for depth in (100, 10_000, 100_000) for row in rows_of(depth, BATCH * args.batches, args.rounds)]
    report.table("speed", f"One thread, batches of {BATCH}, {args.rounds} rounds", rows, COLUMNS)
    for key, (target, sign) in TARGETS.items():
        worst = min(row[key] for row in rows if row["what"] == AGEING)
        print(f"  {key}: {worst:,.2f} at the worst depth without fairness, target {sign} {target:,}")
    report.save(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
