"""Feed a CacheMonitor from a real engine, and check that both agree.

Two accounts of the same cache. Blocks whose content is kept come from the engine's events. Blocks that running requests
hold follow from how many tokens each has: ceil(tokens / block size), common prefixes once. The engine's own figures are
its metrics: usage, prefix-cache queries and hits. Where the accounts differ, the monitor is wrong, and says so.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ch16.kvcache.events import Cleared, Event, EventStream, Removed, Stored
from common.cli import CannotRun
from common.load import send_wave

if TYPE_CHECKING:
    from vllm import LLM


class Monitor(Protocol):
    """What is fed: see CacheMonitor."""

    @property
    def stats(self) -> dict[str, int]: ...  # noqa: D102
    def record_allocation(self, size: int, block: object = None) -> None: ...  # noqa: D102
    def record_free(self, size: int | None = None, block: object = None) -> None: ...  # noqa: D102
    def record_hit(self, count: int = 1) -> None: ...  # noqa: D102
    def record_miss(self, count: int = 1) -> None: ...  # noqa: D102
    def record_eviction(self, count: int = 1) -> None: ...  # noqa: D102


class CachedBlocks:
    """Blocks with findable content, from events. The same content may lie in several blocks: each is counted."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._copies: Counter[int | bytes] = Counter()

    def __len__(self) -> int:
        return self._copies.total()

    def apply(self, event: Event) -> None:
        """Follow one event.

        Raises:
            CannotRun: a block was removed that was never stored.
        """
        if isinstance(event, Stored):
            self._copies.update(event.hashes)
        elif isinstance(event, Removed):
            for name in event.hashes:
                if self._copies[name] == 0:
                    raise CannotRun(f"the engine removed block {name!r}, which it never stored: events were lost")
                self._copies[name] -= 1
                self._monitor.record_eviction()
        elif isinstance(event, Cleared):
            self._copies.clear()


@dataclass
class _Running:
    prompt: Sequence[int]
    blocks: list[object] = field(default_factory=list)  # ids of those it holds


class HeldBlocks:
    """Blocks that running requests hold, from their tokens alone: what the monitor calls usage."""

    def __init__(self, monitor: Monitor, block_size: int, block_bytes: int) -> None:
        self._monitor, self._size, self._bytes = monitor, block_size, block_bytes
        self._holders: Counter[object] = Counter()
        self._running: dict[str, _Running] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def progress(self, request: str, prompt: Sequence[int], tokens_out: int, cached_tokens: int) -> None:
        """A request has got `tokens_out` tokens; `cached_tokens` of its prompt were found in the cache.

        The newest token's key and value are not computed yet.
        """
        known = self._running.setdefault(request, _Running(prompt))
        for i in range(len(known.blocks), math.ceil((len(prompt) + tokens_out - 1) / self._size)):
            end = (i + 1) * self._size
            name: object = (request, i)  # its own, unless its content is a whole block of the prompt
            if end <= len(prompt):
                content = hash(tuple(prompt[:end]))
                if end <= cached_tokens or content not in self._holders:
                    name = content
            known.blocks.append(name)
            if name not in self._holders:
                self._monitor.record_allocation(self._bytes, name)
            self._holders[name] += 1

    def finish(self, request: str) -> None:
        """A request has ended; blocks that nobody else holds are free."""
        for name in self._running.pop(request).blocks:
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                self._monitor.record_free(block=name)


@dataclass(frozen=True)
class Sample:
    """The cache after one engine step: seconds since the start, blocks, and totals since the start."""

    seconds: float
    held_blocks: int
    cached_blocks: int
    hits: int
    misses: int
    evictions: int
    preemptions: int
    running: int


class EngineFeed:
    """Drives an engine step by step, feeds the monitor, and compares it with the engine's own figures.

    Args:
        llm: an engine with KV events and its statistics on, and without asynchronous scheduling: there a step's
            figures belong to the step after it.
        stream: the engine's events.
    """

    def __init__(self, llm: "LLM", monitor: Monitor, stream: EventStream, block_bytes: int) -> None:
        self.llm, self.monitor, self.stream = llm, monitor, stream
        config = llm.llm_engine.vllm_config.cache_config
        self.block_size, self.total_blocks = config.block_size, config.num_gpu_blocks - 1  # one is never given out
        self.cached, self.held = CachedBlocks(monitor), HeldBlocks(monitor, self.block_size, block_bytes)
        self._block_bytes = block_bytes
        self.samples: list[Sample] = []
        self.checked_steps = self.steps = self.peak_running = 0
        self._started = time.perf_counter()
        self._hits = self._queries = 0  # tokens, by the requests' own account
        self._first = self.metrics()
        self._verified, self._waited = (0, 0, self._first), False  # hits, queries and metrics at the last verify

    def metrics(self) -> dict[str, float]:
        """The engine's gauges and counters, by name without its prefix."""
        return {m.name.removeprefix("vllm:"): m.value for m in self.llm.get_metrics() if hasattr(m, "value")}

    def run(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> list[float]:
        """All prompts at once, `tokens_out` tokens each, with every check that a step allows.

        Returns:
            Seconds to the first token of each request.

        Raises:
            CannotRun: the monitor and the engine disagree.
        """
        from vllm import SamplingParams

        engine, unfinished, first = self.llm.llm_engine, {}, {}
        sampling = SamplingParams(temperature=1.0, max_tokens=tokens_out, ignore_eos=True)
        sent = time.perf_counter()
        for i, prompt in enumerate(prompts):
            name = f"{self.steps}-{i}"
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
            unfinished[name] = prompt
        while engine.has_unfinished_requests():
            shown = set()
            for output in engine.step():
                shown.add(output.request_id)
                name, prompt = output.request_id, unfinished[output.request_id]
                if name not in first:
                    first[name] = time.perf_counter() - sent
                    self._count(prompt, output.num_cached_tokens or 0)
                self.held.progress(name, prompt, len(output.outputs[0].token_ids), output.num_cached_tokens or 0)
                if output.finished:
                    self.held.finish(name)
                    del unfinished[name]
            self._after_step(all_shown=shown >= set(unfinished))
        return list(first.values())

    def _count(self, prompt: Sequence[int], cached: int) -> None:
        self._queries += len(prompt)
        self._hits += cached
        self.monitor.record_hit(cached)
        self.monitor.record_miss(len(prompt) - cached)

    def _after_step(self, all_shown: bool) -> None:
        self.steps += 1
        self._waited |= not all_shown
        for event in self.stream.poll():
            self.cached.apply(event)
        now = self.metrics()
        used = round(now["kv_cache_usage_perc"] * self.total_blocks)
        running = int(now["num_requests_running"])
        self.peak_running = max(self.peak_running, running)
        # A request that waits, was preempted, or has read only a part of its prompt shows no token in this step.
        if all_shown:
            self.checked_steps += 1
            ours = self.monitor.stats["current_usage"] // self._block_bytes
            if used != ours:
                raise CannotRun(f"step {self.steps}: {ours} blocks in use by the monitor, {used} by the engine")
        self.samples.append(
            Sample(
                time.perf_counter() - self._started, used, len(self.cached), self._hits, self._queries - self._hits,
                self.evictions, int(now["num_preemptions"] - self._first["num_preemptions"]), running,
            )
        )  # fmt: skip

    @property
    def evictions(self) -> int:
        """Blocks that lost their content so far."""
        return self.monitor.stats["evictions"]

    def verify_events(self) -> None:
        """Wait until all events have come, and compare the blocks with content.

        Raises:
            CannotRun: events are missing, or the engine counts other blocks.
        """
        arrived = True
        while arrived:  # the publisher is a thread of its own: until it has been quiet for a moment
            arrived = [self.cached.apply(event) for event in self.stream.poll(0.3)]
        for event in self.stream.catch_up():  # a batch lost at the end leaves no gap
            self.cached.apply(event)
        if self.stream.lost:
            raise CannotRun(f"{self.stream.lost} batches of KV cache events were lost and could not be replayed")
        blocks = blocks_with_content(self.llm)
        if blocks is not None and blocks != len(self.cached):
            raise CannotRun(f"blocks with content: {len(self.cached):,} by the monitor, {blocks:,} by the engine")

    def verify(self) -> bool:
        """Compare everything since the last time; whether hits could be compared, too.

        Older versions of vLLM look a waiting request up again in every step and count each time; where requests waited,
        their larger counts are not comparable.

        Raises:
            CannotRun: something differs, or events are missing.
        """
        self.verify_events()
        hits, queries, before = self._verified
        now, waited = self.metrics(), self._waited
        self._verified, self._waited = (self._hits, self._queries, now), False
        pairs = {
            "queries": (self._queries - queries, now["prefix_cache_queries"] - before["prefix_cache_queries"]),
            "hits": (self._hits - hits, now["prefix_cache_hits"] - before["prefix_cache_hits"]),
        }
        if waited and pairs["queries"][1] > pairs["queries"][0]:
            return False
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise CannotRun(f"prefix cache {what}: {ours:,} by the monitor, {theirs:,.0f} by the engine")
        return True


class Follower:
    """The monitored engine as production would run it: driven as the others are, events applied after each wave."""

    def __init__(self, feed: EngineFeed) -> None:
        self._feed = feed

    def wave(self, prompts: Sequence[Sequence[int]], tokens_out: int) -> None:
        """Send a wave and follow its events."""
        send_wave(self._feed.llm, prompts, tokens_out)
        for event in self._feed.stream.poll():
            self._feed.cached.apply(event)


def blocks_with_content(llm: "LLM") -> int | None:
    """Blocks in the engine's own table of findable content; None where it runs in another process."""
    try:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        table = pool.cached_block_hash_to_block._cache
    except AttributeError:
        return None
    return sum(len(found) if isinstance(found, dict) else 1 for found in table.values())
