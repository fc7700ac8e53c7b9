from ch16.parts.request_scheduler.mix import Job
from ch16.parts.request_scheduler.simulate import Clock, serve_simulated
from ch16.parts.request_scheduler.tables import wait_rows
from ch16.request_scheduler import InferenceScheduler
from common.costs import Costs


def test_rows_of_waits():
    clock = Clock()
    jobs = [Job(0.0, "high", "a", 1, 2), Job(0.0, "low", "a", 1, 2)]
    answers = serve_simulated(jobs, InferenceScheduler(clock=clock), clock, Costs(1.0, 0.0, 0.0), 1)
    high, low = wait_rows("p", answers, lambda job: job.kind, lambda job: 2.0)
    assert (high["max_s"], low["max_s"], high["over_bound"], low["over_bound"]) == (1.0, 3.0, 0, 1)
    assert high["tokens_per_s"] == 4 / 4
