import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.timing import graphed, measure, measure_together, median_error, percentile, relative_spread

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values)
def test_median_is_the_50th_percentile(xs):
    assert percentile(xs, 50) == pytest.approx(statistics.median(xs), rel=1e-9, abs=1e-9)


@given(values, st.floats(0, 100), st.floats(0, 100))
def test_percentiles_grow_and_stay_in_range(xs, p, q):
    low, high = sorted((p, q))
    assert percentile(xs, low) <= percentile(xs, high) + 1e-9
    assert min(xs) - 1e-9 <= percentile(xs, p) <= max(xs) + 1e-9


@pytest.mark.parametrize(("xs", "q"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_impossible_percentiles(xs, q):
    with pytest.raises(ValueError):
        percentile(xs, q)


def test_counts_calls():
    calls = []
    timing = measure(lambda: calls.append(1), warmup=2, repeats=5)
    assert len(calls) == 7 and len(timing.seconds) == 5


def test_measures_the_work():
    assert measure(lambda: time.sleep(0.02), warmup=0, repeats=3).median >= 0.02


def test_spread_and_error_by_hand():
    assert relative_spread((1.0, 2.0, 3.0)) == pytest.approx(0.5)
    assert median_error((1.0, 2.0, 3.0)) == pytest.approx(1.2533 * 0.5 / 1.349 / 3**0.5, rel=1e-3)


def test_no_repeats():
    with pytest.raises(ValueError):
        measure(lambda: None, repeats=0)


@pytest.mark.gpu
def test_cuda_time_is_device_time_not_launch_time():
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    timing = measure(lambda: a @ a, device="cuda", repeats=10)
    flops_per_s = 2 * 8192**3 / timing.median
    assert 50e12 < flops_per_s < 5000e12, "a launch alone would look thousands of times faster"


def test_together_takes_turns():
    calls = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = measure_together(works, warmup=2, repeats=3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.gpu
def test_a_graph_replays_the_work_on_new_inputs():
    import torch

    x = torch.ones(4, device="cuda")
    out = torch.zeros(4, device="cuda")
    replay = graphed(lambda: torch.add(x, 1, out=out))
    x.fill_(41)
    replay()
    assert out.tolist() == [42.0] * 4
