"""The claim: the signals that count requests against GPU utilization, for the same replica-hours."""

from collections.abc import Mapping, Sequence

from ch16.parts.autoscaling.search import Tried, missed_at_price
from common.results import Verdict, judge, not_applicable

FEWER = 1 / 5  # misses of the best signal, over those of GPU utilization for the same replica-hours
COUNTS = ("queue", "active", "larger")  # the signals that count requests


def claim(rows: Mapping[str, Mapping], frontier: Sequence[Tried]) -> Verdict:
    """A1 from the bursty rows by signal; `frontier`: all that utilization gave, which may mix two targets."""
    if "gpu" not in rows or not set(COUNTS) & set(rows):
        return not_applicable("A1", "--signals left out GPU utilization or all that count requests")
    counted = min(
        (rows[name] for name in COUNTS if name in rows), key=lambda row: (row["missed_percent"], row["hours"])
    )
    gpu = rows["gpu"]
    same_price = missed_at_price(frontier, counted["hours"])
    text = (
        f"simulated, bursty: {counted['missed_percent']:.2f}% misses for {counted['hours']:.1f} replica-hours on "
        f"{counted['signal']}. GPU utilization: {gpu['missed_percent']:.2f}% for {gpu['hours']:.1f}, and "
        f"{same_price:.2f}% for as many replica-hours, if two targets may take turns"
    )
    if "queue" in rows:
        alone = rows["queue"]
        text += f". Queue depth alone: {alone['missed_percent']:.2f}% for {alone['hours']:.1f}"
    return judge("A1", counted["missed_percent"] <= FEWER * same_price and same_price > 0, text)
