"""The simulated engine against one that takes every step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.request_scheduler.mix import Job, bursty_mix
from ch16.parts.request_scheduler.simulate import Clock, serve_simulated
from ch16.request_scheduler import InferenceScheduler
from common.costs import Costs

COSTS = Costs(base_s=0.01, sequence_s=0.002, prompt_token_s=0.001)


def step_by_step(jobs, policy, costs, slots):
    """The same engine, one step at a time: when each job got its first and its last token."""
    clock = Clock()
    queue = InferenceScheduler(**policy, clock=clock)
    coming, running, times = list(jobs), [], {}
    while coming or running or len(queue):
        if not running and not len(queue):
            clock.now = max(clock.now, coming[0].arrival_s)
        now = clock.now
        while coming and coming[0].arrival_s <= now:
            clock.now = coming[0].arrival_s
            queue.add_request(coming[0], coming[0].priority, tokens=coming[0].tokens_in, tenant=coming[0].tenant)
            coming.pop(0)
        clock.now = now
        joined = queue.get_next_batch(slots - len(running)) if len(running) < slots else []
        running += [[job, job.tokens_out] for job in joined]
        clock.now += costs.step_s(len(running), sum(job.tokens_in for job in joined))
        for entry in running:
            queue.charge(entry[0].tenant, 2)
            entry[1] -= 1
            times.setdefault(id(entry[0]), [clock.now])
            if entry[1] == 0:
                times[id(entry[0])].append(clock.now)
        running = [entry for entry in running if entry[1]]
    return [times[id(job)] for job in jobs]


@st.composite
def mixes(draw):
    count = draw(st.integers(1, 25))
    gaps = draw(st.lists(st.floats(0, 0.2), min_size=count, max_size=count))
    kinds = draw(st.lists(st.sampled_from(["high", "normal", "low"]), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    tenants = draw(st.lists(st.sampled_from("ab"), min_size=count, max_size=count))
    jobs, now = [], 0.0
    for gap, kind, length, tenant in zip(gaps, kinds, lengths, tenants, strict=True):
        now += gap
        jobs.append(Job(now, kind, tenant, 5, length))
    return jobs


@given(mixes(), st.integers(1, 5), st.sampled_from([0.0, 0.01, math.inf]), st.booleans())
def test_jumps_give_the_times_of_single_steps(jobs, slots, ageing_s, fair):
    clock = Clock()
    answers = serve_simulated(jobs, InferenceScheduler(ageing_s, fair, clock=clock), clock, COSTS, slots)
    found = {id(answer.job): (answer.first_s, answer.last_s) for answer in answers}
    assert len(found) == len(jobs)
    for job, times in zip(jobs, step_by_step(jobs, {"ageing_s": ageing_s, "fair": fair}, COSTS, slots), strict=True):
        assert found[id(job)] == pytest.approx(times, abs=1e-9)


def test_the_rate_of_a_full_engine():
    """Eight slots, ten steps of 26 ms each a request, and its prompt's share of a step: 8 / (0.26 + 8 * 0.005)."""
    assert 1 / COSTS.slot_s(8, 5, 10) == pytest.approx(8 / (0.26 + 0.04))
    jobs = bursty_mix(4000, 1e6, math.inf, 5, 10, seed=0)
    clock = Clock()
    answers = serve_simulated(jobs, InferenceScheduler(clock=clock), clock, COSTS, 8)
    assert len(answers) / max(a.last_s for a in answers) == pytest.approx(1 / COSTS.slot_s(8, 5, 10), rel=0.03)
