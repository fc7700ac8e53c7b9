"""The claim: what priorities do for the urgent, and what the others pay."""

from collections.abc import Sequence

from ch16.parts.request_scheduler.mix import CLASSES
from ch16.parts.request_scheduler.tables import LIVE
from common.results import Verdict, judge

TTFT_TARGET = 0.25  # P99 time to first token of high priority, over that of first come, first served
THROUGHPUT_TARGET = 0.97


def _by_policy(rows: Sequence[dict]) -> list[dict[str, dict]]:
    """Live rows by class, for each policy of LIVE."""
    by_name = {(row["policy"], row["group"][2:]): row for row in rows}
    return [{kind: by_name[policy, kind] for kind in CLASSES} for policy in LIVE]


def claim(rows: Sequence[dict]) -> Verdict:
    """Q1 from the live rows."""
    fcfs, strict, aged = _by_policy(rows)
    ratio, throughput = (strict["high"][key] / fcfs["high"][key] for key in ("p99_s", "tokens_per_s"))
    text = (
        f"P99 TTFT of high priority {ratio:.2f} of first come, first served, at {throughput:.2f} of its throughput; "
        f"low priority waited up to {strict['low']['max_s']:.1f} s instead of {fcfs['low']['max_s']:.1f} s. With "
        f"ageing: {aged['high']['p99_s'] / fcfs['high']['p99_s']:.2f}, and up to {aged['low']['max_s']:.1f} s"
    )
    return judge("Q1", ratio <= TTFT_TARGET and throughput >= THROUGHPUT_TARGET, text)


def message(rows: Sequence[dict]) -> str:
    """What the picture shows, from the live rows."""
    fcfs, strict, _ = _by_policy(rows)
    high, low = (strict[kind]["p99_s"] / fcfs[kind]["p99_s"] for kind in ("high", "low"))
    return f"With priorities, high priority has {high:.2g}x the P99 TTFT of FCFS, and low priority {low:.2g}x"
