"""What is possible: the gain of continuous over fixed batches, and the batch from which computing limits a step."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from common.gpu import Peak
from common.load import Timeline
from common.models import parameter_count
from common.timing import percentile

# ---- admission ----


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
    """As `bound`, where a step takes longer the more requests run: the last steps of a fixed batch cost less.

    `step_s`: seconds of a decode step by requests in it; interpolated between them.
    """
    batches = batches_of(lengths, slots)
    running = [sum(length > step for length in batch) for batch in batches for step in range(max(batch))]
    *fixed, full = np.interp([*running, slots], list(step_s), list(step_s.values()))
    return float(sum(fixed) / (sum(lengths) / slots * full))


def step_seconds(timeline: Timeline) -> dict[int, float]:
    """Median seconds of the steps that read no prompt, by requests in them."""
    added, ends = sorted(timeline.sent.values()), [step.ended for step in timeline.steps]
    found: dict[int, list[float]] = defaultdict(list)
    for i in range(1 + timeline.ahead, len(ends)):
        # The step's requests were added up to a moment between these two ends.
        scheduled = ends[i - 1 - timeline.ahead : i - timeline.ahead + 1]
        if len({bisect_left(added, at) for at in scheduled}) == 1:
            found[timeline.steps[i].requests].append(ends[i] - ends[i - 1])
    return {count: percentile(seconds, 50) for count, seconds in sorted(found.items())}


def median_run(timelines: Sequence[Timeline]) -> Timeline:
    """The run that took the median time."""
    return sorted(timelines, key=lambda run: run.steps[-1].ended - run.steps[0].ended)[len(timelines) // 2]


# ---- the roofline ----


def crossover(
    peak: Peak, config: Mapping[str, object], fp8: bool, kv_bytes: int, tokens: int, context: int
) -> tuple[float | None, str]:
    """The batch from which a step is limited by computing instead of memory, and how it is known; None if it is not.

    FLOPs: 2 per weight and token. Bytes: the weights once, and the keys and values of each sequence. Computing takes
    longer from FLOPs / peak FLOP/s = bytes / peak bytes/s on (Williams, Waterman and Patterson, "Roofline", 2009).
    Attention's own FLOPs are left out: a few percent in short contexts. Weights and products are in BF16, or in FP8.

    Per sequence, a step computes new `tokens` (1 in decode, the prompt in prefill), and reads or writes the keys and
    values of `context` tokens, of `kv_bytes` each.
    """
    itemsize, flops_per_s = (1, peak.fp8_flops) if fp8 else (2, peak.bf16_flops)
    parameters = parameter_count(config)
    if not flops_per_s or not peak.bytes_per_s:
        return None, "unknown: no data sheet for this machine"
    if parameters is None or config.get("num_experts") or config.get("num_local_experts"):
        return None, "unknown: not a dense Llama-like model"
    ridge = flops_per_s / peak.bytes_per_s  # FLOPs per byte
    # An embedding that is not also the head is looked up, not multiplied.
    looked_up = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
    weights = parameters - looked_up
    flops_each, bytes_each = 2 * weights * tokens, context * kv_bytes
    if flops_each <= ridge * bytes_each:
        return math.inf, "never: the KV cache alone needs more"
    return ridge * weights * itemsize / (flops_each - ridge * bytes_each), f"data sheet: {ridge:.0f} FLOPs per byte"
