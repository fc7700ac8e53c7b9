"""The two accounts of blocks, against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.kv_cache_monitor import CacheMonitor
from ch16.kvcache.events import Cleared, Removed, Stored
from ch16.kvcache.feed import CachedBlocks, HeldBlocks
from common.cli import CannotRun

EVENTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(lambda names: Stored(tuple(names), 16)),
        st.integers(0, 5).map(lambda name: Removed((name,))),
        st.just(Cleared()),
    ),
    max_size=40,
)


@given(EVENTS)
def test_blocks_with_content_against_a_list(events):
    monitor, plain, evicted = CacheMonitor(), [], 0
    cached = CachedBlocks(monitor, 100)
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
        assert len(cached) == len(plain) and monitor.stats["current_usage"] == 100 * len(plain)
    assert monitor.stats["evictions"] == evicted


def test_blocks_of_a_request_by_hand():
    held = HeldBlocks(4)
    held.progress("a", range(6), 1, 0)  # 6 tokens computed: 2 blocks
    assert len(held) == 2
    held.progress("a", range(6), 3, 0)  # 8 tokens: still 2
    assert len(held) == 2
    held.progress("a", range(6), 4, 0)
    assert len(held) == 3
    held.finish("a")
    assert len(held) == 0


def test_a_common_prefix_is_held_once():
    held, prefix = HeldBlocks(4), list(range(8))
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
    held = HeldBlocks(size)
    for i, (prompt, out) in enumerate(requests):
        held.progress(str(i), [1000 * i + n for n in range(prompt)], out, 0)
    assert len(held) == sum(-(-(prompt + out - 1) // size) for prompt, out in requests)
