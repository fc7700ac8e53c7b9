import math

import pytest

from ch16.parts.request_scheduler.mix import CLASSES, HEAVY, SchedulingSizes, bursty_mix, live_load
from common.costs import Costs


def test_bursts():
    jobs = bursty_mix(20_000, 10.0, 60.0, 8, 20, seed=1)
    busy = sum(math.fmod(job.arrival_s, 60) < 30 for job in jobs)
    assert busy / len(jobs) == pytest.approx(0.75, abs=0.02)
    assert len(jobs) / jobs[-1].arrival_s == pytest.approx(10, rel=0.05)
    assert sum(job.tenant == HEAVY for job in jobs) / len(jobs) == pytest.approx(0.7, abs=0.02)
    assert sum(job.kind == "low" for job in jobs) / len(jobs) == pytest.approx(0.3, abs=0.02)
    lengths = [job.tokens_out for job in jobs]
    assert (min(lengths), max(lengths)) == (10, 30) and sum(lengths) / len(lengths) == pytest.approx(20, rel=0.02)
    assert bursty_mix(50, 10.0, 60.0, 8, 20, seed=1) == jobs[:50]


def test_a_steady_load_has_no_bursts():
    jobs = bursty_mix(20_000, 10.0, math.inf, 8, 20, seed=1)
    assert len(jobs) / jobs[-1].arrival_s == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("base_s", "count", "seconds"), [(0.001, 1625, 2.5), (0.01, 162, 2.5), (0.1, 50, 7.692), (60.0, 50, 4615.4)]
)
def test_a_slow_model_gets_the_time_for_enough_requests(base_s, count, seconds):
    """8 at once of 16 tokens each are answered in 16 steps; 1.3 times as many come."""
    sizes = SchedulingSizes(8, (32, 16), 2.5)
    found, per_s, span = live_load(sizes, Costs(base_s, 0.0, 0.0))
    assert (found, span) == (count, pytest.approx(seconds, rel=1e-3)) and per_s == pytest.approx(1.3 * 8 / 16 / base_s)
    jobs = bursty_mix(found, per_s, math.inf, 32, 16, seed=0)
    assert {job.kind for job in jobs} == set(CLASSES)
