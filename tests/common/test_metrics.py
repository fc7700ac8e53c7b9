import asyncio
import bisect
import contextlib
import gc
import inspect
import itertools
import math
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from common.metrics import (
    GATEWAY_OUTCOMES,
    LATENCY_BUCKETS,
    OUTCOMES,
    GatewayMetrics,
    InferenceMetrics,
    Rate,
    histogram_quantile,
)

LE = (0.1, 0.5, 1.0, math.inf)


def test_names_and_types_are_the_chapters():
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    text = generate_latest(registry).decode()
    for line in (
        "# TYPE inference_requests_total counter",
        "# TYPE inference_latency_seconds histogram",
        "# TYPE inference_active_requests gauge",
        "# TYPE inference_throughput_tokens_per_sec gauge",
        "# TYPE inference_draining gauge",
    ):
        assert line in text
    assert all(f'inference_requests_total{{outcome="{outcome}"}} 0.0' in text for outcome in OUTCOMES)


def test_twice_on_one_registry_is_an_error():
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    with pytest.raises(ValueError):
        InferenceMetrics(registry)


def test_buckets_resolve_10_ms_to_ten_minutes():
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1]) == (0.01, 600) and 60 in LATENCY_BUCKETS
    steps = [b / a for a, b in itertools.pairwise(LATENCY_BUCKETS)]
    assert all(1.4 < step < 1.8 for step in steps)


def test_rate_forgets_what_is_older_than_its_window():
    rate = Rate(window_s=10)
    assert rate.update(0, 100) == 0
    assert rate.update(5, 200) == pytest.approx(20)
    for second in range(6, 60):
        last = rate.update(second, 200)
    assert last == 0


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 100)), min_size=2, max_size=50))
def test_rate_equals_the_counter_over_its_window(steps):
    rate, now, value, readings = Rate(10.0), 0.0, 0, []
    for seconds, events in steps:
        now, value = now + seconds, value + events
        readings.append((now, value))
        measured = rate.update(now, value)
    inside = [i for i, (t, _) in enumerate(readings) if t > now - 10.0]
    start_s, start = readings[max(0, inside[0] - 1)]
    expected = (value - start) / (now - start_s) if now > start_s else 0.0
    assert measured == pytest.approx(expected)


@example([0.5, 0.5, 0.5], 1.0)  # 0.1 + 0.4 * 3 / 3 is above 0.5
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantile_is_in_the_bucket_of_the_true_one(values, q):
    buckets = [(bound, sum(value <= bound for value in values)) for bound in LE]
    rank = math.ceil(q * len(values) - 1e-9) - 1
    true = sorted(values)[rank]
    i = bisect.bisect_left(LE, true)
    assert (LE[i - 1] if i else 0) <= histogram_quantile(q, buckets) <= LE[i]


def test_quantile_at_the_edges():
    assert histogram_quantile(0.5, []) is None and histogram_quantile(0.5, [(1.0, 0), (math.inf, 0)]) is None
    assert histogram_quantile(0.5, [(math.inf, 10), (1.0, 10)]) == 0.5
    assert histogram_quantile(0.99, [(1.0, 5), (2.0, 5), (math.inf, 10)]) == 2.0


# ---- process_request ----


class Served:
    """A function of each kind, decorated; it fails if told to."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.metrics = InferenceMetrics(self.registry)
        self.seen = []  # active requests, as each part of an answer is made

    def value(self, name, **labels):
        return self.registry.get_sample_value(name, labels)

    @property
    def counts(self):
        """The outcomes that happened, how many requests were timed, how many are active."""
        values = {outcome: self.value("inference_requests_total", outcome=outcome) for outcome in OUTCOMES}
        happened = {outcome: value for outcome, value in values.items() if value}
        return happened, self.value("inference_latency_seconds_count"), self.value("inference_active_requests")

    def work(self, fail):
        self.seen.append(self.value("inference_active_requests"))
        if fail:
            raise ValueError("no")

    def call(self, kind, fail=False):
        """Call a function of this kind and read its answer to the end."""

        @self.metrics.process_request
        def plain(fail):
            """A docstring."""
            self.work(fail)
            return [1, 2]

        @self.metrics.process_request
        async def coroutine(fail):
            await asyncio.sleep(0)
            self.work(fail)
            return [1, 2]

        @self.metrics.process_request
        def stream(fail):
            yield 1
            self.work(fail)
            yield 2

        @self.metrics.process_request
        async def async_stream(fail):
            yield 1
            self.work(fail)
            yield 2

        async def read():
            return [part async for part in async_stream(fail)]

        assert plain.__name__ == "plain" and plain.__doc__ == "A docstring."
        assert inspect.isasyncgenfunction(async_stream) and inspect.isgeneratorfunction(stream)
        return {
            "plain": lambda: plain(fail),
            "coroutine": lambda: asyncio.run(coroutine(fail)),
            "stream": lambda: list(stream(fail)),
            "async stream": lambda: asyncio.run(read()),
        }[kind]()


KINDS = ("plain", "coroutine", "stream", "async stream")


@pytest.fixture
def served():
    return Served()


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_counted_active_and_timed(served, kind):
    assert served.call(kind) == [1, 2] and served.seen == [1]
    assert served.counts == ({"ok": 1}, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_so_is_one_that_fails(served, kind):
    with pytest.raises(ValueError, match="no"):
        served.call(kind, fail=True)
    assert served.seen == [1] and served.counts == ({"error": 1}, 1, 0)


def test_a_stream_is_active_until_it_is_closed(served):
    @served.metrics.process_request
    def stream():
        yield from range(9)

    answer = stream()
    assert served.counts == ({}, 0, 0)  # nobody has asked for a part yet
    assert next(answer) == 0 and served.counts == ({}, 0, 1)
    answer.close()
    assert served.counts == ({"cancelled": 1}, 1, 0)


@pytest.mark.parametrize("how", ["closed", "cancelled", "forgotten"])
def test_an_async_stream_is_active_until_it_is_left(served, how):
    cleaned = []

    @served.metrics.process_request
    async def stream():
        try:
            for i in range(9):
                yield i
                await asyncio.sleep(0)
        finally:
            cleaned.append(True)

    async def read(answer):
        async for _ in answer:
            await asyncio.sleep(60)

    async def scenario():
        answer = stream()
        if how == "cancelled":
            task = asyncio.create_task(read(answer))
            await asyncio.sleep(0)
        else:
            await anext(answer)
        assert served.counts == ({}, 0, 1)
        if how == "closed":
            await answer.aclose()
        elif how == "cancelled":
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await answer.aclose()  # as a web framework does
        else:
            del answer
            gc.collect()
            await asyncio.sleep(0.01)  # the event loop closes it

    asyncio.run(scenario())
    assert cleaned and served.counts == ({"cancelled": 1}, 1, 0)


def test_a_coroutine_that_is_cancelled(served):
    @served.metrics.process_request
    async def wait():
        await asyncio.sleep(60)

    async def scenario():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wait(), 0.01)

    asyncio.run(scenario())
    assert served.counts == ({"cancelled": 1}, 1, 0)


def test_requests_that_are_refused_are_neither_active_nor_timed(served):
    with served.metrics.request(accepted=False) as request:
        assert served.counts[2] == 0
        request.outcome = "rejected"
    with served.metrics.request(accepted=False) as request:
        request.accept()
        assert served.counts[2] == 1
        request.outcome = "invalid"  # the engine found out
    assert served.counts == ({"rejected": 1, "invalid": 1}, 0, 0)


def test_many_threads_lose_no_count(served):
    threads = [threading.Thread(target=lambda: [served.call("plain") for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.counts == ({"ok": 1600}, 1600, 0)


# ---- the gateway ----


def test_labels_of_the_gateway_are_its_outcomes_and_the_servers_there_are():
    metrics = GatewayMetrics()
    state = {"in_flight": 2, "ready": True, "breaker_open": False}
    metrics.render({"a:1": state, "b:2": state})
    text = metrics.render({"b:2": state | {"ready": False}}).decode()
    assert 'gateway_server_ready{server="b:2"} 0.0' in text and "a:1" not in text
    assert all(f'gateway_requests_total{{outcome="{outcome}"}} 0.0' in text for outcome in GATEWAY_OUTCOMES)
    assert "gateway_draining 0.0" in text
