"""Workloads that fill a KV cache in different ways, and engines compared in turn."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.kv_cache_monitor.feed import CacheSample, EngineFeed
from ch16.parts.kv_cache_monitor.sizes import CacheSizes
from common.cli import CannotRun
from common.load import random_prompts, send_wave
from common.timing import median_error, percentile

if TYPE_CHECKING:
    from vllm import LLM

PRECISE = 0.002  # standard error of a ratio that separates 0.995 from 0.99


def workloads(sizes: CacheSizes, vocab_size: int, seed: int) -> dict[str, list[tuple[list[list[int]], int]]]:
    """Waves of prompts and tokens out for each workload: nothing in common, a common prefix, more than fits."""
    (prefix,) = random_prompts(1, sizes.prefix, vocab_size, seed + 1)
    tails = random_prompts(sizes.requests, sizes.block_size, vocab_size, seed + 2)
    # Twice as much live context as there are blocks: as many prompts as fit are admitted, and then all of them grow.
    many, prompt_blocks = 2 * sizes.blocks // 5, 4
    return {
        "unrelated prompts": [(random_prompts(sizes.requests, 4 * sizes.block_size, vocab_size, seed), 16)],
        "common prefix": [([prefix + tails[0]], 4), ([prefix + tail for tail in tails], 8)],
        "more than fits": [
            (random_prompts(many, prompt_blocks * sizes.block_size, vocab_size, seed + 3), sizes.block_size)
        ],
    }


def run_workloads(feed: EngineFeed, sizes: CacheSizes, vocab_size: int, seed: int) -> list[dict]:
    """Rows of WORKLOAD_COLUMNS, one after another on the same cache; every step and all totals are checked."""
    rows = []
    for name, waves in tqdm(workloads(sizes, vocab_size, seed).items(), desc="workloads", leave=False, disable=None):
        before, first, steps, checked = feed.monitor.stats, len(feed.samples), feed.steps, feed.checked_steps
        started = feed.samples[-1] if feed.samples else CacheSample(0.0, 0, 0, 0, 0, 0, 0, 0)
        begun = time.perf_counter()
        for prompts, tokens_out in waves:
            feed.run(prompts, tokens_out)
        seconds = time.perf_counter() - begun
        feed.verify()
        seen, after = feed.samples[first:], feed.monitor.stats
        hits, misses = (after[key] - before[key] for key in ("cache_hits", "cache_misses"))
        peak = max(sample.held_blocks for sample in seen)
        rows.append(
            {
                "workload": name,
                "requests": sum(len(prompts) for prompts, _ in waves),
                "seconds": seconds,
                "peak_held": peak,
                "usage_percent": 100 * peak / feed.total_blocks,
                "cached": len(feed.cached),
                "hit_percent": 100 * hits / (hits + misses),
                "evictions": after["evictions"] - before["evictions"],
                "preemptions": seen[-1].preemptions - started.preemptions,
                "peak_running": max(sample.running for sample in seen),
                "checked": feed.checked_steps - checked,
                "steps": feed.steps - steps,
            }
        )
    return rows


def fits_rows(feed: EngineFeed, sizes: CacheSizes, vocab_size: int, seed: int) -> list[dict]:
    """Rows of FITS_COLUMNS: short requests, with memory for the longest reserved for each, and as they grow."""
    tokens_out = sizes.block_size
    reserved = -(-sizes.max_len // sizes.block_size)
    blocks = 2  # per request: one of prompt, one of answer
    prompts = random_prompts(feed.total_blocks // blocks, sizes.block_size, vocab_size, seed + 9)
    first, preemptions = len(feed.samples), feed.metrics()["num_preemptions"]
    feed.run(prompts, tokens_out)
    feed.verify()
    if feed.metrics()["num_preemptions"] > preemptions:
        raise CannotRun(f"{len(prompts)} requests of {blocks} blocks should fit into {feed.total_blocks}, and did not")
    paged = max(sample.held_blocks for sample in feed.samples[first:]) // blocks
    rows = (
        (f"reserved: {sizes.max_len:,} tokens", reserved, feed.total_blocks // reserved, "computed"),
        (f"paged: {sizes.block_size} tokens in, {tokens_out} out", blocks, paged, "measured, none preempted"),
    )
    return [dict(zip(("how", "blocks", "fit", "source"), row, strict=True)) for row in rows]


def compare(
    what: str, variant: Callable[[int], float], base: Callable[[int], float], rounds: int, seconds: float = 0
) -> dict[str, float | str]:
    """A row of COMPARISON_COLUMNS: both measured in turn, the first to go alternating; the median of the ratios.

    Args:
        rounds: the fewest.
        seconds: rounds go on for this time at most, until the ratio is known to `PRECISE`.
    """
    variant(-1), base(-1)  # warm up
    pairs, ratios, error = [], [], math.inf
    started = time.perf_counter()
    with tqdm(desc=what, unit=" rounds", leave=False, disable=None) as progress:
        while len(pairs) < rounds or (error > PRECISE and time.perf_counter() - started < seconds):
            i = len(pairs)
            order = (variant, base) if i % 2 == 0 else (base, variant)
            found = {work: work(i) for work in order}
            pairs.append((found[variant], found[base]))
            ratios.append(found[variant] / found[base])
            error = median_error(ratios)
            progress.update()
    return {
        "what": what,
        "variant": percentile([pair[0] for pair in pairs], 50),
        "base": percentile([pair[1] for pair in pairs], 50),
        "ratio": percentile(ratios, 50),
        "error_percent": 100 * error,
        "rounds": len(pairs),
    }


def throughput(
    run: Callable[[Sequence[Sequence[int]], int], object], sizes: CacheSizes, vocab_size: int, seed: int
) -> Callable:
    """Output tokens/s of a wave of unrelated prompts, new ones in each round."""

    def wave(round_: int) -> float:
        prompts = random_prompts(sizes.requests, 2 * sizes.block_size, vocab_size, seed + 100 + round_)
        started = time.perf_counter()
        run(prompts, sizes.answer)
        return sizes.requests * sizes.answer / (time.perf_counter() - started)

    return wave


def first_token_ms(llm: "LLM", sizes: CacheSizes, vocab_size: int, seed: int, requests: int) -> Callable[[int], float]:
    """Median TTFT in milliseconds of `requests` at once, with a prefix that all rounds share, the warm-up included."""
    (prefix,) = random_prompts(1, sizes.prefix, vocab_size, seed + 1)

    def wave(round_: int) -> float:
        tails = random_prompts(requests, sizes.block_size, vocab_size, seed + 1000 * requests + round_)
        sent, arrived = send_wave(llm, [prefix + tail for tail in tails], 2)
        return 1e3 * percentile([tokens[0] - start for start, tokens in zip(sent, arrived, strict=True)], 50)

    return wave
