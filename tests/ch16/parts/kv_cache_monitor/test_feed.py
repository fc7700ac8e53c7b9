"""The two accounts of blocks, against brute force."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.kv_cache_monitor import CacheMonitor
from ch16.parts.kv_cache_monitor.events import Cleared, Removed, Stored
from ch16.parts.kv_cache_monitor.feed import CachedBlocks, EngineFeed, HeldBlocks
from common.cli import CannotRun

EVENTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(lambda names: Stored(tuple(names))),
        st.integers(0, 5).map(lambda name: Removed((name,))),
        st.just(Cleared()),
    ),
    max_size=40,
)


@given(EVENTS)
def test_blocks_with_content_against_a_list(events):
    monitor, plain, evicted = CacheMonitor(), [], 0
    cached = CachedBlocks(monitor)
    for event in events:
        if isinstance(event, Removed) and event.hashes[0] not in plain:
            with pytest.raises(CannotRun, match="which it never stored: events were lost"):
                cached.apply(event)
            continue
        cached.apply(event)
        if isinstance(event, Stored):
            plain += event.hashes  # the same content may lie in two blocks
        elif isinstance(event, Removed):
            plain.remove(event.hashes[0])
            evicted += 1
        else:
            plain.clear()
        assert len(cached) == len(plain)
    assert monitor.stats["evictions"] == evicted


def test_blocks_of_a_request_by_hand():
    monitor = CacheMonitor()
    held = HeldBlocks(monitor, 4, 100)
    held.progress("a", range(6), 1, 0)  # 6 tokens computed: 2 blocks
    assert len(held) == 2
    held.progress("a", range(6), 3, 0)  # 8 tokens: still 2
    assert len(held) == 2
    held.progress("a", range(6), 4, 0)
    assert len(held) == 3
    assert monitor.stats["current_usage"] == 300
    held.finish("a")
    assert len(held) == 0 and monitor.stats["current_usage"] == 0


def test_a_common_prefix_is_held_once():
    held, prefix = HeldBlocks(CacheMonitor(), 4, 100), list(range(8))
    held.progress("a", [*prefix, 100], 1, 0)
    held.progress("b", [*prefix, 200], 1, 8)
    assert len(held) == 2 + 1 + 1
    held.finish("a")
    assert len(held) == 3
    held.progress("c", [*prefix, 300], 1, 0)  # computed anew at the same time as others: blocks of its own
    assert len(held) == 3 + 3
    held.finish("b")
    held.finish("c")
    assert len(held) == 0


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8), st.integers(1, 9))
def test_unrelated_requests_add_up(requests, size):
    held = HeldBlocks(CacheMonitor(), size, 100)
    for i, (prompt, out) in enumerate(requests):
        held.progress(str(i), [1000 * i + n for n in range(prompt)], out, 0)
    assert len(held) == sum(-(-(prompt + out - 1) // size) for prompt, out in requests)


class OneRequestEngine:
    """Stands in for vLLM: one request of 6 tokens gets 3 more, on 9 blocks of 4 tokens; `wrong` changes its figures."""

    def __init__(self, **wrong):
        self.wrong, self.left, self.tokens = wrong, 0, 0
        cache = SimpleNamespace(block_size=4, num_gpu_blocks=10)
        scheduler = SimpleNamespace(async_scheduling=False)
        self.vllm_config = SimpleNamespace(cache_config=cache, scheduler_config=scheduler)
        self.llm_engine, self.figures = self, {"queries": 0, "hits": 0}
        table = {"one block": object()} if wrong.get("content") is None else {}
        pool = SimpleNamespace(cached_block_hash_to_block=SimpleNamespace(_cache=table))
        manager = SimpleNamespace(block_pool=pool)
        core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=manager))
        self.engine_core = SimpleNamespace(engine_core=core)

    def add_request(self, name, prompt, sampling, priority):
        self.name, self.left, self.tokens = name, 3, 0

    def step(self):
        self.left, self.tokens = self.left - 1, self.tokens + 1
        if self.tokens == 1:
            self.figures = {"queries": 6, "hits": 0}
        out = [SimpleNamespace(token_ids=[0])]
        return [SimpleNamespace(request_id=self.name, outputs=out, num_cached_tokens=0, finished=self.left == 0)]

    def get_metrics(self):
        used = -(-(6 + self.tokens - 1) // 4) if self.left else 0
        figures = {
            "kv_cache_usage_perc": (used + self.wrong.get("used", 0)) / 9,
            "num_requests_running": 1,
            "num_preemptions": 0,
            "prefix_cache_queries": self.figures["queries"] + (self.wrong.get("queries", 0) if self.tokens else 0),
            "prefix_cache_hits": self.figures["hits"] + (self.wrong.get("hits", 0) if self.tokens else 0),
        }
        return [SimpleNamespace(name=f"vllm:{name}", value=value) for name, value in figures.items()]


class OneStored:
    """Stands in for the engine's events: one block stored."""

    lost = 0

    def __init__(self):
        self.waiting = [Stored((1,))]

    def poll(self, timeout_s=0.0):
        found, self.waiting = self.waiting, []
        return found

    def catch_up(self):
        return []


def feed_of(**wrong):
    return EngineFeed(OneRequestEngine(**wrong), CacheMonitor(), OneStored(), block_bytes=100)


def test_a_feed_that_agrees():
    feed = feed_of()
    feed.run([list(range(6))], 3)
    feed.verify()
    assert (feed.checked_steps, feed.steps, len(feed.cached)) == (3, 3, 1)
    assert feed.monitor.stats["cache_misses"] == 6 and feed.monitor.stats["current_usage"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"used": 1}, "step 1: 2 blocks in use by the monitor, 3 by the engine"),
        ({"queries": 5}, "prefix cache queries: 6 by the monitor, 11 by the engine"),
        ({"hits": 4}, "prefix cache hits: 0 by the monitor, 4 by the engine"),
        ({"content": "none"}, "cached blocks: 1 by the monitor, 0 by the engine"),
    ],
)
def test_every_difference_is_an_error(wrong, message):
    feed = feed_of(**wrong)
    with pytest.raises(CannotRun, match=message):
        feed.run([list(range(6))], 3)
        feed.verify()


def test_lost_events_are_an_error():
    feed = feed_of()
    feed.stream.lost = 2
    with pytest.raises(CannotRun, match="2 batches of KV cache events were lost"):
        feed.verify()
