"""The search for a signal's target, the same for every signal: the fewest misses within a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tried:
    """A target, the percentage of requests that missed the objective with it, and its replica-hours."""

    target: float
    missed_percent: float
    hours: float


def find_target(
    run: Callable[[float], Tried], low: float, high: float, budget_h: float, count: int, refine: int = 3
) -> list[Tried]:
    """`count` targets from `low` to `high`, evenly by ratio, then `refine` rounds of two around the best; all tried."""
    targets = [_short(low * (high / low) ** (i / (count - 1))) for i in range(count)]
    tried = {target: run(target) for target in targets}
    for _ in range(refine):
        ordered = sorted(tried)
        at = ordered.index(best(tried.values(), budget_h).target)
        for neighbour in ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]:
            between = _short(math.sqrt(ordered[at] * neighbour))
            if between not in tried:
                tried[between] = run(between)
    return [tried[target] for target in sorted(tried)]


def best(tried: Sequence[Tried], budget_h: float) -> Tried:
    """The fewest misses within the budget (of equals the cheapest); if none is within it, the cheapest of all."""
    within = [point for point in tried if point.hours <= budget_h]
    if within:
        return min(within, key=lambda point: (point.missed_percent, point.hours))
    return min(tried, key=lambda point: point.hours)


def missed_at_price(tried: Sequence[Tried], hours: float) -> float:
    """The fewest misses (percent) for `hours` replica-hours, if two targets may take turns: the lower convex hull.

    Where all cost more, the misses of the cheapest.
    """
    cheaper = [point for point in tried if point.hours <= hours]
    if not cheaper:
        return min(tried, key=lambda point: point.hours).missed_percent
    in_turns = [
        a.missed_percent + (b.missed_percent - a.missed_percent) * (hours - a.hours) / (b.hours - a.hours)
        for a in cheaper
        for b in tried
        if b.hours > hours
    ]
    return min([point.missed_percent for point in cheaper] + in_turns)


def _short(target: float) -> float:
    return float(f"{target:.3g}")  # as it is printed, and written into a manifest
