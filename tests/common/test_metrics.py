import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from common.metrics import LATENCY_BUCKETS, OUTCOMES, InferenceMetrics, Rate


def test_names_and_types_are_the_chapters():
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    text = generate_latest(registry).decode()
    for line in (
        "# TYPE inference_requests_total counter", "# TYPE inference_latency_seconds histogram",
        "# TYPE inference_active_requests gauge", "# TYPE inference_throughput_tokens_per_sec gauge",
    ):  # fmt: skip
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
