"""Replicas in jumps against replicas that take every step."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch16.parts.autoscaling.records import DRAINING, REPLICA, SERVING, SLOT, as_requests
from ch16.parts.autoscaling.replica import advance
from common.traces import Arrival

# Seconds that binary numbers hold exactly: a jump over many steps ends where the steps do.
COSTS = BASE_S, SEQUENCE_S, PROMPT_TOKEN_S = 1 / 16, 1 / 64, 1 / 256


class StepByStep:
    """One replica that takes all its steps, one by one."""

    def __init__(self, slots):
        self.slots, self.clock, self.busy_s, self.waiting, self.running = slots, 0.0, 0.0, [], []

    def take_steps(self, until, requests):
        while self.clock < until and (self.running or self.waiting):
            joined = self.waiting[: self.slots - len(self.running)]
            self.waiting = self.waiting[len(joined) :]
            self.running += [[name, 0] for name in joined]
            prompt_tokens = sum(requests["tokens_in"][name] for name in joined)
            seconds = BASE_S + SEQUENCE_S * len(self.running) + PROMPT_TOKEN_S * prompt_tokens
            self.clock += seconds
            self.busy_s += seconds
            for entry in self.running:
                entry[1] += 1
                if entry[1] == 1:
                    requests["first_s"][entry[0]] = self.clock
                if entry[1] == requests["tokens_out"][entry[0]]:
                    requests["last_s"][entry[0]] = self.clock
            self.running = [entry for entry in self.running if entry[1] < requests["tokens_out"][entry[0]]]

    def tokens(self, requests):
        return sum(requests["tokens_in"][name] + done for name, done in self.running)


def step_by_step(requests, slots, ready_s, stops):
    """Serve up to each of `stops`; yields the replicas then."""
    replicas, coming = [StepByStep(slots) for _ in ready_s], list(range(len(requests)))
    for stop in stops:
        while True:
            now = requests["at_s"][coming[0]] if coming and requests["at_s"][coming[0]] < stop else stop
            for replica in replicas:
                replica.take_steps(now, requests)
            if now == stop:
                break
            ready = [replica for replica, at in zip(replicas, ready_s, strict=True) if at <= now]
            chosen = min(ready, key=lambda replica: len(replica.running) + len(replica.waiting))
            if not chosen.running and not chosen.waiting:
                chosen.clock = max(chosen.clock, now)
            chosen.waiting.append(coming.pop(0))
        yield replicas


traces = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 3, 8, 40, 400]), st.integers(1, 30), st.integers(1, 60)),
    min_size=1,
    max_size=60,
)


def requests_of(trace):
    at, arrivals = 0.0, []
    for gap, tokens_in, tokens_out in trace:
        at += gap / 32
        arrivals.append(Arrival(at, tokens_in, tokens_out))
    return as_requests(arrivals)


@settings(max_examples=200)
@given(traces, st.integers(1, 4), st.lists(st.sampled_from([0.0, 1.0, 7.5]), max_size=3), st.integers(1, 6))
def test_jumps_give_the_times_of_single_steps(trace, slots, ready_s, cuts):
    """No approximation: the times of all tokens, what is held and how long it was busy are those of single steps."""
    requests, twin = requests_of(trace), requests_of(trace)
    ready_s = [0.0, *ready_s]
    replicas = np.zeros(len(ready_s), REPLICA)
    replicas["state"], replicas["ready_s"] = SERVING, ready_s
    places = np.zeros((len(ready_s), slots), SLOT)
    stops = [*np.linspace(0, requests["at_s"][-1] + 1, cuts), math.inf]
    sent = 0
    for stop, slow in zip(stops, step_by_step(twin, slots, ready_s, stops), strict=True):
        sent = advance(replicas, places, requests, sent, COSTS, stop)
        for ours, theirs in zip(replicas, slow, strict=True):
            assert (ours["running"], ours["waiting"]) == (len(theirs.running), len(theirs.waiting))
            assert ours["held"] + ours["step"] * ours["running"] == theirs.tokens(twin)
            assert ours["busy_s"] == theirs.busy_s
    assert sent == len(requests)
    assert (requests["first_s"] == twin["first_s"]).all() and (requests["last_s"] == twin["last_s"]).all()


def test_a_replica_that_drains_takes_no_more_and_ends_what_it_has():
    requests = requests_of([(0, 1, 50), (0, 1, 50), (0, 1, 50), (32, 1, 1)])
    replicas = np.zeros(2, REPLICA)
    replicas["state"] = SERVING
    places = np.zeros((2, 1), SLOT)
    sent = advance(replicas, places, requests, 0, COSTS, 0.5)
    assert sent == 3 and list(replicas["running"] + replicas["waiting"]) == [2, 1]
    replicas["state"][1] = DRAINING  # the one with less to do
    advance(replicas, places, requests, sent, COSTS, math.inf)
    assert (requests["last_s"] > 0).all()
    assert requests["first_s"][3] > requests["last_s"][2]  # behind the others at the one that serves


@pytest.mark.parametrize("slots", [1, 8])
def test_a_full_replica_keeps_the_rate_that_costs_foretell(slots):
    from common.costs import Costs

    costs, count = Costs(BASE_S, SEQUENCE_S, PROMPT_TOKEN_S), 400
    requests = as_requests([Arrival(0.0, 20, 30)] * count)
    replicas = np.zeros(1, REPLICA)
    replicas["state"] = SERVING
    places = np.zeros((1, slots), SLOT)
    advance(replicas, places, requests, 0, COSTS, math.inf)
    assert requests["last_s"].max() == pytest.approx(count * costs.slot_s(slots, 20, 30), rel=1e-9)
