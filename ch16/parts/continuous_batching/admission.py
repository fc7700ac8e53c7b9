"""What fixed batches lose: lengths of answers, what they allow at most, and the rows of both ways to admit."""

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ch16.parts.continuous_batching.drive import Course
from common.results import Column
from common.timing import percentile

ADMISSION_COLUMNS = (
    Column("admission", "admission"),
    Column("tokens_per_s", "output tok/s", ",.1f"),
    Column("running", "running on average", ".2f"),
    Column("wait_p50_s", "wait P50 s", ",.2f"),
    Column("wait_p99_s", "wait P99 s", ",.2f"),
    Column("e2e_p50_s", "E2E P50 s", ",.2f"),
    Column("e2e_p99_s", "E2E P99 s", ",.2f"),
)
GAIN_COLUMNS = (
    Column("bound", "continuous over fixed, output tok/s"),
    Column("at_most", "at most", ".2f"),
    Column("measured", "measured", ".2f"),
    Column("share", "share", ".2f"),
)
FIT_COLUMNS = (
    Column("how", "KV memory for a request of this load"),
    Column("blocks", "blocks each", ".1f"),
    Column("fit", "fit at once", ",d"),
)


@dataclass(frozen=True)
class Load:
    """Requests that are all there at the start: so many, tokens of a prompt and (on average) of an answer."""

    slots: int  # that run together
    requests: int
    tokens_in: int
    tokens_out: int
    rounds: int  # of which the median counts: on a CPU other programs disturb

    @property
    def longest(self) -> int:
        """Tokens of the longest answer there may be."""
        return 8 * self.tokens_out


def geometric_lengths(load: Load, seed: int) -> list[int]:
    """Tokens of each answer: each token is the last one with the same probability, as if by a coin.

    Of such lengths the longest of N is H(N) = 1 + 1/2 + ... + 1/N times the mean (cut at `Load.longest`: a bit less).
    """
    rng = random.Random(seed)
    draws = (1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / load.tokens_out)) for _ in range(load.requests))
    return [min(length, load.longest) for length in draws]


def batches_of(items: Sequence, slots: int) -> list[Sequence]:
    """The items in order, `slots` at a time."""
    return [items[i : i + slots] for i in range(0, len(items), slots)]


# ---- what the lengths alone allow ----


def bound(lengths: Sequence[int], slots: int) -> float:
    """Most that continuous batching can gain: E[longest of a batch] / E[length], of these very batches.

    If every step takes the same time, fixed batches need the sum of their longest, and nothing needs fewer steps than
    full slots: all tokens / slots.
    """
    return sum(map(max, batches_of(lengths, slots))) / (sum(lengths) / slots)


def bound_by_time(lengths: Sequence[int], slots: int, step_s: Mapping[int, float]) -> float:
    """As `bound`, where a step takes the longer the more requests run.

    Finished members leave a fixed batch, so its last steps cost less than those of full slots.

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


def step_seconds(course: Course) -> dict[int, float]:
    """Median seconds of the steps that read no prompt, by requests in them."""
    added, ends = sorted(course.sent.values()), [end for end, _ in course.steps]
    found: dict[int, list[float]] = {}
    for i in range(1 + course.ahead, len(ends)):
        scheduled = ends[i - 1 - course.ahead : i - course.ahead + 1]  # its requests were added up to between these
        if len({bisect_left(added, at) for at in scheduled}) == 1:
            found.setdefault(course.steps[i][1], []).append(ends[i] - ends[i - 1])
    return {count: percentile(seconds, 50) for count, seconds in sorted(found.items())}


# ---- rows ----


def median_course(courses: Sequence[Course]) -> Course:
    """The one that took neither the longest nor the shortest."""
    return sorted(courses, key=lambda course: course.steps[-1][0] - course.steps[0][0])[len(courses) // 2]


def admission_row(name: str, course: Course) -> dict:
    """A row of ADMISSION_COLUMNS. A request waits until it is given to the engine; all were there at the start."""
    start = min(course.sent.values())
    waits = [sent - start for sent in course.sent.values()]
    e2e = [tokens[-1] - start for tokens in course.arrived.values()]
    return {
        "admission": name,
        "tokens_per_s": sum(map(len, course.arrived.values())) / max(e2e),
        "running": sum(count for _, count in course.steps) / len(course.steps),
        "wait_p50_s": percentile(waits, 50),
        "wait_p99_s": percentile(waits, 99),
        "e2e_p50_s": percentile(e2e, 50),
        "e2e_p99_s": percentile(e2e, 99),
    }


def gain_rows(measured: float, lengths: Sequence[int], slots: int, step_s: Mapping[int, float]) -> list[dict]:
    """Rows of GAIN_COLUMNS: the measured gain beside both bounds."""
    bounds = {
        "E[longest of a batch] / E[length]": bound(lengths, slots),
        "the same, at the step times of these runs": bound_by_time(lengths, slots, step_s),
    }
    return [{"bound": n, "at_most": b, "measured": measured, "share": measured / b} for n, b in bounds.items()]


def fit_rows(load: Load, lengths: Sequence[int], blocks: int, block_size: int, max_model_len: int) -> list[dict]:
    """Rows of FIT_COLUMNS, computed: the longest sequence reserved for each, or blocks as each needs them (K2)."""
    reserved = math.ceil(max_model_len / block_size)
    paged = sum(math.ceil((load.tokens_in + length) / block_size) for length in lengths) / len(lengths)
    hows = {f"reserved: {max_model_len:,} tokens": reserved, "paged: as many as it has tokens for": paged}
    return [{"how": how, "blocks": each, "fit": int(blocks / each)} for how, each in hows.items()]
