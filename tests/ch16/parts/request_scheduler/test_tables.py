import pytest

from ch16.parts.request_scheduler.mix import Job
from ch16.parts.request_scheduler.simulate import Clock, serve_simulated
from ch16.parts.request_scheduler.tables import LIVE, claim, message, wait_rows
from ch16.request_scheduler import InferenceScheduler
from common.costs import Costs


def test_rows_of_waits():
    clock = Clock()
    jobs = [Job(0.0, "high", "a", 1, 2), Job(0.0, "low", "a", 1, 2)]
    answers = serve_simulated(jobs, InferenceScheduler(clock=clock), clock, Costs(1.0, 0.0, 0.0), 1)
    high, low = wait_rows("p", answers, lambda job: job.kind, lambda job: 2.0)
    assert (high["max_s"], low["max_s"], high["over_bound"], low["over_bound"]) == (1.0, 3.0, 0, 1)
    assert high["tokens_per_s"] == 4 / 4


def rows_of(ratio, throughput):
    rows = []
    for policy in LIVE:
        for group in ("1 high", "2 normal", "3 low"):
            rows.append({"policy": policy, "group": group, "p99_s": 4.0, "max_s": 5.0, "tokens_per_s": 100.0})
    rows[3] |= {"p99_s": 4.0 * ratio, "tokens_per_s": 100 * throughput}
    rows[6] |= {"p99_s": 1.2}
    return rows[::-1]


@pytest.mark.parametrize(
    ("ratio", "throughput", "verdict"), [(0.2, 0.98, "holds"), (0.3, 1.0, "fails"), (0.1, 0.9, "fails")]
)
def test_the_claim(ratio, throughput, verdict):
    found = claim(rows_of(ratio, throughput))
    assert found.verdict == verdict and "With ageing: 0.30" in found.measured


def test_the_pictures_message_is_computed():
    assert "high priority has 0.2x the P99 TTFT of FCFS, and low priority 1x" in message(rows_of(0.2, 1.0))
