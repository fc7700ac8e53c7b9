"""What does recording cost in `CacheMonitor`, against the chapter's plain dictionary? (`make bench-cache-monitor`)

CacheMonitor takes a lock and refuses impossible calls; the chapter's class adds to a dictionary. Each round times a
method of both in turn, in alternating order, and a ratio is of the two times of the same round.

    python3 tests/bench/cache_monitor.py --json results/cpu/bench_cache_monitor.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import time
from collections.abc import Callable

from ch16.kv_cache_monitor import CacheMonitor
from common import cli
from common.gpu import detect
from common.results import Column, Report
from common.timing import median_error, percentile

TARGET_US = 1.0  # per call: a step of an engine records a few dozen and takes milliseconds
COLUMNS = (
    Column("method", "method"),
    Column("monitor_us", "CacheMonitor us", ".3f"),
    Column("chapter_us", "chapter us", ".3f"),
    Column("ratio", "ratio", ".2f"),
    Column("error", "standard error", ".2f"),
    Column("low", "lowest", ".2f"),
    Column("high", "highest", ".2f"),
    Column("per_s", "calls/s", ",.0f"),
)


class ChapterMonitor:
    """The chapter's listing: a dictionary, no lock, no refusals."""

    def __init__(self) -> None:
        self.stats = dict.fromkeys(
            ("total_allocated", "total_freed", "current_usage", "cache_hits", "cache_misses", "evictions"), 0
        )

    def record_allocation(self, size: int) -> None:
        self.stats["total_allocated"] += size
        self.stats["current_usage"] += size

    def record_free(self, size: int) -> None:
        self.stats["total_freed"] += size
        self.stats["current_usage"] -= size

    def record_hit(self) -> None:
        self.stats["cache_hits"] += 1

    def record_miss(self) -> None:
        self.stats["cache_misses"] += 1

    def record_eviction(self) -> None:
        self.stats["evictions"] += 1


METHODS = {  # in an order in which nothing is freed that is not in use
    "record_allocation": (1,),
    "record_free": (1,),
    "record_hit": (),
    "record_miss": (),
    "record_eviction": (),
}


def microseconds(method: Callable, arguments: tuple[int, ...], calls: int) -> float:
    """Microseconds per call, one thread."""
    started = time.perf_counter()
    for _ in range(calls):
        method(*arguments)
    return 1e6 * (time.perf_counter() - started) / calls


def method_row(name: str, arguments: tuple[int, ...], monitors: tuple, rounds: int, calls: int) -> dict[str, object]:
    """A row of COLUMNS: one method of both monitors in turn."""
    monitor, chapter, ratios = [], [], []
    for number in range(rounds):
        order = monitors if number % 2 else monitors[::-1]
        took = {contender: microseconds(getattr(contender, name), arguments, calls) for contender in order}
        monitor.append(took[monitors[0]])
        chapter.append(took[monitors[1]])
        ratios.append(monitor[-1] / chapter[-1])
    ratio = percentile(ratios, 50)
    row = {"method": name, "monitor_us": percentile(monitor, 50), "chapter_us": percentile(chapter, 50), "ratio": ratio}
    row |= {"error": ratio * median_error(ratios), "low": min(ratios), "high": max(ratios)}
    return row | {"per_s": 1e6 / row["monitor_us"]}


def main() -> int:
    """Time the methods in turn, print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=21, help="default: 21")
    parser.add_argument("--calls", type=cli.positive_int, default=20_000, help="per round and method; default: 20,000")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()
    report = Report("tests/bench/cache_monitor.py", detect(), {"rounds": args.rounds, "calls": args.calls})
    report.print_card()
    monitors = CacheMonitor(), ChapterMonitor()
    rows = [method_row(name, arguments, monitors, args.rounds, args.calls) for name, arguments in METHODS.items()]
    report.table("calls", f"Medians of {args.rounds} rounds of {args.calls:,} calls, one thread", rows, COLUMNS)
    slowest = max(rows, key=lambda row: row["monitor_us"])
    print(f"  slowest: {slowest['method']}, {slowest['monitor_us']:.2f} us per call, target < {TARGET_US:.0f} us")
    report.save(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
