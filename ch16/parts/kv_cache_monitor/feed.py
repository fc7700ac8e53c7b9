"""Feed a CacheMonitor from a real engine, and check that both agree.

Cached blocks follow from the engine's events. Blocks that running requests hold follow from each request's tokens:
ceil(tokens / block size), common prefixes once. The engine's own figures are its metrics: usage, prefix-cache queries
and hits. A difference between the monitor and the engine is an error.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ch16.parts.kv_cache_monitor.events import Cleared, Event, EventStream, Removed, Stored
from common.cli import CannotRun
from common.load import send_wave

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

Monitor = Any  # the CacheMonitor that the script hands in


class CachedBlocks:
    """Blocks whose content can be reused, from events. Several blocks may have the same content: all are counted."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._copies: Counter[int | bytes] = Counter()

    def __len__(self) -> int:
        return self._copies.total()

    def apply(self, event: Event) -> None:
        """Count the blocks of one event. CannotRun: a block was removed that was never stored."""
        if isinstance(event, Stored):
            self._copies.update(event.hashes)
        elif isinstance(event, Removed):
            for name in event.hashes:
                if self._copies[name] == 0:
                    raise CannotRun(f"the engine removed block {name!r}, which it never stored: events were lost")
                self._copies[name] -= 1
                if not self._copies[name]:
                    del self._copies[name]
                self._monitor.record_eviction()
        elif isinstance(event, Cleared):
            self._copies.clear()


class HeldBlocks:
    """Blocks that running requests hold, from their tokens alone: the monitor's usage."""

    def __init__(self, monitor: Monitor, block_size: int, block_bytes: int) -> None:
        self._monitor, self._size, self._bytes = monitor, block_size, block_bytes
        self._holders: Counter[object] = Counter()
        self._blocks: defaultdict[str, list[object]] = defaultdict(list)  # of each request, their ids

    def __len__(self) -> int:
        return len(self._holders)

    def progress(self, request: str, prompt: Sequence[int], tokens_out: int, cached_tokens: int) -> None:
        """A request has `tokens_out` tokens so far; `cached_tokens` of its prompt were found in the cache.

        The newest token's key and value are not computed yet.
        """
        blocks = self._blocks[request]
        for i in range(len(blocks), math.ceil((len(prompt) + tokens_out - 1) / self._size)):
            end = (i + 1) * self._size
            name: object = (request, i)  # its own, unless its content is a whole block of the prompt
            if end <= len(prompt):
                content = hash(tuple(prompt[:end]))
                if end <= cached_tokens or content not in self._holders:
                    name = content
            blocks.append(name)
            if name not in self._holders:
                self._monitor.record_allocation(self._bytes, name)
            self._holders[name] += 1

    def finish(self, request: str) -> None:
        """A request has ended; blocks that no other request holds are free."""
        for name in self._blocks.pop(request):
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                self._monitor.record_free(block=name)


@dataclass(frozen=True)
class CacheSample:
    """The cache after one engine step: seconds since the start, blocks, and totals since the start."""

    seconds: float
    held_blocks: int
    cached_blocks: int
    hits: int
    misses: int
    evictions: int
    running: int


class EngineFeed:
    """Drives an engine step by step, feeds the monitor, and compares it with the engine's own figures.

    The engine needs KV events and statistics, and no asynchronous scheduling: a step's figures would be the next one's.
    """

    def __init__(self, llm: "LLM", monitor: Monitor, stream: EventStream, block_bytes: int) -> None:
        self.llm, self.monitor, self.stream = llm, monitor, stream
        config = llm.llm_engine.vllm_config.cache_config
        self.block_size, self.total_blocks = config.block_size, config.num_gpu_blocks - 1  # vLLM never hands out one
        self.cached, self.held = CachedBlocks(monitor), HeldBlocks(monitor, self.block_size, block_bytes)
        self._block_bytes = block_bytes
        self.samples: list[CacheSample] = []
        self.checked_steps = self.steps = 0
        self._started = time.perf_counter()
        self._verified = self._lookups()  # at the last call of verify

    def metrics(self) -> dict[str, float]:
        """The engine's gauges and counters, by name without its prefix."""
        return {m.name.removeprefix("vllm:"): m.value for m in self.llm.get_metrics() if hasattr(m, "value")}

    def _lookups(self) -> dict[str, tuple[float, float]]:
        """Tokens looked up and found so far: by the monitor, and by the engine."""
        stats, engine = self.monitor.stats, self.metrics()
        hits, queries = stats["cache_hits"], stats["cache_hits"] + stats["cache_misses"]
        return {"queries": (queries, engine["prefix_cache_queries"]), "hits": (hits, engine["prefix_cache_hits"])}

    def run(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        """All prompts at once, `tokens_out` tokens each, with every check that a step allows.

        CannotRun, here and below: the monitor and the engine disagree.
        """
        tokens = [0] * len(prompts)

        def after_step(outputs: Sequence["RequestOutput"]) -> None:
            for output in outputs:
                i, cached = int(output.request_id), output.num_cached_tokens or 0
                if tokens[i] == 0:
                    self.monitor.record_hit(cached)
                    self.monitor.record_miss(len(prompts[i]) - cached)
                tokens[i] += len(output.outputs[0].token_ids)
                self.held.progress(output.request_id, prompts[i], tokens[i], cached)
                if output.finished:
                    self.held.finish(output.request_id)
                    unfinished.remove(output.request_id)
            self._after_step(all_shown=unfinished <= {output.request_id for output in outputs})

        unfinished = {str(i) for i in range(len(prompts))}
        send_wave(self.llm, prompts, tokens_out, after_step)

    def follow_wave(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        """Send a wave as in production: nothing is compared, and events are read after it."""
        send_wave(self.llm, prompts, tokens_out)
        self._follow_events()

    def _follow_events(self, timeout_s: float = 0.0) -> int:
        """Apply the events that have arrived; returns how many. Waits for the first at most `timeout_s`."""
        count = 0
        for count, event in enumerate(self.stream.poll(timeout_s), start=1):  # noqa: B007 (the last count)
            self.cached.apply(event)
        return count

    def _after_step(self, all_shown: bool) -> None:
        self.steps += 1
        self._follow_events()
        now, stats = self.metrics(), self.monitor.stats
        used = round(now["kv_cache_usage_perc"] * self.total_blocks)
        # A request that waits, was preempted, or has read only a part of its prompt shows no token in this step.
        if all_shown:
            self.checked_steps += 1
            held = stats["current_usage"] // self._block_bytes
            if used != held:
                raise CannotRun(f"step {self.steps}: {held} blocks in use by the monitor, {used} by the engine")
        seconds, running = time.perf_counter() - self._started, int(now["num_requests_running"])
        totals = (stats[key] for key in ("cache_hits", "cache_misses", "evictions"))
        self.samples.append(CacheSample(seconds, used, len(self.cached), *totals, running))

    def verify_events(self) -> None:
        """Wait until all events have arrived, and compare the cached blocks."""
        while self._follow_events(0.3):  # the publisher is a thread: wait until it has been quiet for a moment
            pass
        for event in self.stream.catch_up():  # a batch lost at the end leaves no gap
            self.cached.apply(event)
        if self.stream.lost:
            raise CannotRun(f"{self.stream.lost} batches of KV cache events were lost and could not be replayed")
        blocks = engines_cached_blocks(self.llm)
        if blocks is not None and blocks != len(self.cached):
            raise CannotRun(f"cached blocks: {len(self.cached):,} by the monitor, {blocks:,} by the engine")

    def verify(self) -> None:
        """Compare everything since the last call."""
        self.verify_events()
        before, self._verified = self._verified, self._lookups()
        for what, counts in self._verified.items():
            monitor, engine = (after - earlier for after, earlier in zip(counts, before[what], strict=True))
            if monitor != engine:
                raise CannotRun(f"prefix cache {what}: {monitor:,} by the monitor, {engine:,.0f} by the engine")


def engines_cached_blocks(llm: "LLM") -> int | None:
    """Blocks in the engine's own table of reusable content; None if the engine runs in another process."""
    try:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        table = pool.cached_block_hash_to_block._cache
    except AttributeError:
        return None
    return sum(len(found) if isinstance(found, dict) else 1 for found in table.values())
