import math

import pytest

from ch16.parts.request_scheduler.mix import HEAVY, bursty_mix


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
