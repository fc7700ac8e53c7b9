import math

import pytest

from ch16.parts.request_scheduler.mix import CLASSES, bursty_mix
from ch16.parts.request_scheduler.sizes import SchedulingSizes, live_load
from common.costs import Costs


@pytest.mark.parametrize(
    ("base_s", "count", "seconds"), [(0.001, 1625, 2.5), (0.01, 162, 2.5), (0.1, 50, 7.692), (60.0, 50, 4615.4)]
)
def test_a_slow_model_gets_the_time_for_enough_requests(base_s, count, seconds):
    """8 at once of 16 tokens each are answered in 16 steps; 1.3 times as many come."""
    sizes = SchedulingSizes(8, 32, 16, 2.5)
    found, per_s, span = live_load(sizes, Costs(base_s, 0.0, 0.0))
    assert (found, span) == (count, pytest.approx(seconds, rel=1e-3)) and per_s == pytest.approx(1.3 * 8 / 16 / base_s)
    jobs = bursty_mix(found, per_s, math.inf, 32, 16, seed=0)
    assert {job.kind for job in jobs} == set(CLASSES)
