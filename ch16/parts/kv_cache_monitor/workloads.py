"""Workloads that fill a KV cache in different ways, their sizes, and engines compared in turn."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.kv_cache_monitor.feed import EngineFeed
from common.cli import CannotRun
from common.gpu import Machine
from common.load import random_prompts, send_wave
from common.timing import median_error, percentile

if TYPE_CHECKING:
    from vllm import LLM

PRECISE = 0.002  # standard error of a ratio that separates 0.995 from 0.99


@dataclass(frozen=True)
class CacheSizes:
    """Tokens, blocks and requests of the workloads, and rounds of each comparison."""

    blocks: int  # of the cache
    block_size: int  # tokens
    requests: int  # at once
    max_len: int  # tokens of the longest sequence
    prefix: int  # tokens that prompts have in common
    answer: int  # tokens out where throughput is compared; without --quick a wave takes about a second
    sharing: int  # requests with the common prefix that arrive at once
    rounds: int
    seconds: float  # for which a comparison of throughput goes on if it is not precise after its rounds


def sizes_for(machine: Machine, quick: bool) -> CacheSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores (whose kernels need blocks of 32 tokens)."""
    if machine.device == "cuda":  # short waves in turn: a host that slows down for seconds slows both engines
        rounds, seconds = (3, 0) if quick else (25, 100)
        return CacheSizes(2048, 16, 64, 2048, 1024, 128, sharing=8, rounds=rounds, seconds=seconds)
    if quick:
        return CacheSizes(48, 32, 6, 1280, 768, 16, sharing=1, rounds=3, seconds=0)
    return CacheSizes(80, 32, 8, 2048, 1024, 32, sharing=1, rounds=7, seconds=60)


def workloads(sizes: CacheSizes, vocab_size: int, seed: int) -> dict[str, list[tuple[list[list[int]], int]]]:
    """Waves of prompts and tokens out for each workload: nothing in common, a common prefix, more than fits."""
    (prefix,) = random_prompts(1, sizes.prefix, vocab_size, seed + 1)
    tails = random_prompts(sizes.requests, sizes.block_size, vocab_size, seed + 2)
    # Twice as much live context as there are blocks: as many prompts as fit are admitted, and then all of them grow.
    many, length = 2 * sizes.blocks // 5, 4 * sizes.block_size
    return {
        "unrelated prompts": [(random_prompts(sizes.requests, length, vocab_size, seed), 16)],
        "common prefix": [([prefix + tails[0]], 4), ([prefix + tail for tail in tails], 8)],
        "more than fits": [(random_prompts(many, length, vocab_size, seed + 3), sizes.block_size)],
    }


def run_workloads(feed: EngineFeed, sizes: CacheSizes, vocab_size: int, seed: int) -> list[dict]:
    """Rows of WORKLOAD_COLUMNS, one after another on the same cache; every step and all totals are checked."""
    rows = []
    for name, waves in tqdm(workloads(sizes, vocab_size, seed).items(), desc="workloads", leave=False, disable=None):
        before, first, steps, checked = feed.monitor.stats, len(feed.samples), feed.steps, feed.checked_steps
        preempted = feed.metrics()["num_preemptions"]
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
                "preemptions": int(feed.metrics()["num_preemptions"] - preempted),
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

    After `rounds`, more follow for `seconds` at most, until the ratio is known to `PRECISE`.
    """
    variant(-1), base(-1)  # warm up
    pairs, error = [], math.inf
    started = time.perf_counter()
    with tqdm(desc=what, unit=" rounds", leave=False, disable=None) as progress:
        while len(pairs) < rounds or (error > PRECISE and time.perf_counter() - started < seconds):
            i = len(pairs)
            order = (variant, base) if i % 2 == 0 else (base, variant)
            found = {work: work(i) for work in order}
            pairs.append((found[variant], found[base]))
            ratios = [ours / theirs for ours, theirs in pairs]
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


def throughput(run: Callable, sizes: CacheSizes, vocab_size: int, seed: int) -> Callable[[int], float]:
    """Output tokens/s of a wave of unrelated prompts, new ones in each round; `run` takes prompts and tokens out."""

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
