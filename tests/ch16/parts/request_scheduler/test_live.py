"""The mix on an engine that counts: which requests it gets, in which order, and how many together."""

import pytest

from ch16.parts.request_scheduler import live
from ch16.parts.request_scheduler.mix import Job
from ch16.request_scheduler import InferenceScheduler
from tests.engines import CountingLLM, counted

LATE, LOW = Job(0.02, "high", "a", 3, 2), Job(0.0, "low", "a", 5, 2)
JOBS = [LATE, LOW, Job(0.0, "high", "a", 4, 3), Job(0.0, "low", "a", 2, 1)]


@pytest.mark.parametrize(
    ("queue", "slots", "order", "most"), [(None, 0, "1230", 3), (InferenceScheduler(), 1, "2130", 1)]
)
def test_requests_wait_in_the_engine_or_in_front_of_it(monkeypatch, queue, slots, order, most):
    monkeypatch.setattr(live, "exactly", counted)
    llm = CountingLLM()
    answers, steps = live.serve_live(llm, JOBS, 100, 0, queue, slots)
    assert "".join(llm.priorities) == order and max(llm.running) == most
    assert llm.priorities == {str(i): job.priority for i, job in enumerate(JOBS)}
    assert [answer.job for answer in answers] == JOBS
    assert all(answer.job.arrival_s <= answer.first_s <= answer.last_s for answer in answers)
    assert sum(step.prompt_tokens for step in steps) == sum(job.tokens_in for job in JOBS)
    assert sum(step.sequences for step in steps) == sum(job.tokens_out for job in JOBS)
