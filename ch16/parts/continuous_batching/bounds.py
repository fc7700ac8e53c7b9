"""What continuous batching can gain at most over fixed batches: from the lengths, and from measured step times."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from common.load import Timeline
from common.timing import percentile


def batches_of(items: Sequence, slots: int) -> list[Sequence]:
    """The items in order, `slots` at a time."""
    return [items[i : i + slots] for i in range(0, len(items), slots)]


def bound(lengths: Sequence[int], slots: int) -> float:
    """Largest gain of continuous batching: E[longest of a batch] / E[length], of these batches.

    If every step takes the same time, fixed batches need the sum of their longest answers, and no policy needs fewer
    steps than full slots: all tokens / slots.
    """
    return sum(map(max, batches_of(lengths, slots))) / (sum(lengths) / slots)


def bound_by_time(lengths: Sequence[int], slots: int, step_s: Mapping[int, float]) -> float:
    """As `bound`, where a step takes longer the more requests run.

    Finished requests leave a fixed batch, so its last steps cost less than steps of full slots.

    Args:
        step_s: seconds of a decode step by requests in it; interpolated between them.
    """

    def seconds(running: int) -> float:
        return float(np.interp(running, list(step_s), list(step_s.values())))

    fixed = 0.0
    for batch in batches_of(lengths, slots):
        ends = sorted(batch)
        fixed += sum((end - start) * seconds(len(ends) - i) for i, (start, end) in enumerate(pairwise([0, *ends])))
    return fixed / (sum(lengths) / slots * seconds(slots))


def step_seconds(timeline: Timeline) -> dict[int, float]:
    """Median seconds of the steps that read no prompt, by requests in them."""
    added, ends = sorted(timeline.sent.values()), [step.ended for step in timeline.steps]
    found: dict[int, list[float]] = {}
    for i in range(1 + timeline.ahead, len(ends)):
        # The step's requests were added up to a moment between these two ends.
        scheduled = ends[i - 1 - timeline.ahead : i - timeline.ahead + 1]
        if len({bisect_left(added, at) for at in scheduled}) == 1:
            found.setdefault(timeline.steps[i].requests, []).append(ends[i] - ends[i - 1])
    return {count: percentile(seconds, 50) for count, seconds in sorted(found.items())}


def median_run(timelines: Sequence[Timeline]) -> Timeline:
    """The run that took the median time."""
    return sorted(timelines, key=lambda run: run.steps[-1].ended - run.steps[0].ended)[len(timelines) // 2]
