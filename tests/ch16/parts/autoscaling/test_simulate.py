"""The fleet: cold starts, draining, what is paid for, and what the autoscaler gets to see."""

import numpy as np
import pytest

from ch16.autoscaling import decide
from ch16.parts.autoscaling.hpa import Policy, Rules, Spec
from ch16.parts.autoscaling.records import as_requests
from ch16.parts.autoscaling.signals import Sample, Signal, by_pods, by_pool, signals
from ch16.parts.autoscaling.simulate import INTERVAL_S, Fleet, Pool, simulate_fixed, simulate_fleet
from common.costs import Costs
from common.traces import Arrival

POOL = Pool(Costs(0.1, 0.0, 0.0), slots=2, kv_tokens=1000, cold_start_s=60.0)
AT_ONCE = Rules((Policy("Percent", 100, 15),), 0)


def steady(per_s, seconds, tokens_out=10):
    return as_requests([Arrival(i / per_s, 5, tokens_out) for i in range(int(per_s * seconds))])


class Recorder:
    """A scaler that asks for so many replicas at each turn, and remembers what it saw."""

    def __init__(self, *counts):
        self.counts, self.seen = list(counts), []

    def __call__(self, samples, missing, ready):
        self.seen.append((samples, missing, ready))
        count = self.counts.pop(0) if self.counts else self.last
        self.last = count
        return by_pool(1.0, per_pod=True)([Sample(count, 0, 0.0, 0.0)], 0, 1)


def test_a_fixed_fleet_is_paid_for_from_beginning_to_end():
    outcome = simulate_fleet(steady(2, 100), POOL, Spec(3, 3), Recorder(3), decide)
    turns = len(outcome.asked)
    assert turns == int(np.ceil(99.5 / INTERVAL_S)) + 1
    assert outcome.replica_hours == pytest.approx(3 * turns * INTERVAL_S / 3600)
    assert outcome.flaps == 0 and (outcome.requests["last_s"] > 0).all()
    assert outcome.ttft_s == pytest.approx(0.1)


def test_a_new_replica_is_cold_then_missing_then_seen():
    scaler = Recorder(2)
    outcome = simulate_fleet(steady(2, 150), POOL, Spec(1, 2), scaler, decide)
    assert list(outcome.asked) == [2] * len(outcome.asked)
    # Asked for at 15 s, ready at 75 s; scraped then, and seen one turn later. The first turn has no scrape to see.
    assert [(len(samples), missing) for samples, missing, _ in scaler.seen[:7]] == [(0, 1)] + [(1, 1)] * 4 + [
        (2, 0)
    ] * 2
    assert [ready for _, _, ready in scaler.seen[:6]] == [1, 1, 1, 1, 2, 2]
    assert outcome.replica_hours == pytest.approx((2 * len(outcome.asked) - 1) * INTERVAL_S / 3600)


def test_values_are_one_interval_old():
    requests = as_requests([Arrival(16.0, 5, 10_000), Arrival(100.0, 5, 1)])
    scaler = Recorder(1)
    simulate_fleet(requests, POOL, Spec(1, 1), scaler, decide)
    assert [sum(sample.active for sample in samples) for samples, _, _ in scaler.seen[:3]] == [0, 0, 1]


def test_scaling_down_lets_the_cold_go_first_and_the_busy_finish():
    fleet = Fleet(as_requests([Arrival(0.0, 5, 500), Arrival(0.0, 5, 500), Arrival(80.0, 5, 1)]), POOL)
    fleet.start(2, 0.0, 0.0)
    fleet.advance(15.0)
    fleet.start(1, 15.0, 75.0)
    fleet.stop(1)
    fleet.advance(30.0)
    assert len(fleet.scrape(30.0)) == 2 and fleet.replica_s(30.0) == 2 * 30 + 15  # the cold one is gone
    fleet.stop(1)
    fleet.advance(45.0)
    assert len(fleet.scrape(45.0)) == 1 and fleet.replica_s(45.0) == 2 * 45 + 15  # 50 s of work: still paid for
    fleet.advance(60.0)
    fleet.advance(90.0)
    assert fleet.replica_s(90.0) == 90 + 60 + 15
    assert (fleet.requests["last_s"] > 0).all()


def test_flaps_are_turns_from_up_to_down_and_back():
    spec = Spec(1, 5, Rules((Policy("Pods", 9, 15),), 0), AT_ONCE)
    outcome = simulate_fleet(steady(1, 200), POOL, spec, Recorder(2, 3, 3, 1, 1, 4, 2, 2), decide)
    assert list(outcome.asked[:8]) == [2, 3, 3, 1, 1, 4, 2, 2] and outcome.flaps == 3


def test_what_a_sample_says():
    """Two long requests on one replica with two slots, and one that waits."""
    requests = as_requests([Arrival(5.0, 40, 1000), Arrival(5.0, 60, 1000), Arrival(6.0, 7, 10), Arrival(40.0, 1, 1)])
    (first,), (second,) = simulate_fleet(requests, POOL, Spec(1, 1), Recorder(1), decide).samples[:2]
    assert (first.waiting, first.running, first.active) == (1, 2, 3)
    assert first.gpu == pytest.approx(10 / 15) and second.gpu == pytest.approx(1)
    assert first.kv == pytest.approx((40 + 60 + 2 * 100) / 1000, abs=0.003)
    assert second.kv - first.kv == pytest.approx(2 * 150 / 1000, abs=0.005)


@pytest.mark.parametrize("name", list(signals(8)), ids="on {}".format)  # "gpu" alone would be a mark
def test_a_signal_reads_its_fields_of_every_pod(name):
    signal = signals(8)[name]
    samples = [Sample(3, 8, 1.0, 0.5), Sample(0, 2, 0.25, 0.125)]
    metrics = by_pods(signal, 2.0)(samples, 4, 2)
    values = {"queue": [(3, 0)], "active": [(11, 2)], "larger": [(3, 0), (8, 2)]}
    values |= {"gpu": [(1.0, 0.25)], "kv": [(0.5, 0.125)]}
    assert [metric.values for metric in metrics] == values[name]
    assert all((metric.target, metric.missing, metric.unready) == (2.0, 4, 0) for metric in metrics)
    assert 0 < signal.low < signal.high and isinstance(signal, Signal)


def test_value_on_a_sum_runs_away_where_averagevalue_settles():
    """The trap: the sum does not fall when replicas are added, so a ratio above 1 stays, and multiplies again."""
    requests = steady(4, 1200)  # 4/s of almost 1 s each: about four in flight, however many replicas
    settled = simulate_fleet(requests, POOL, Spec(1, 10), by_pool(1.0, per_pod=True), decide).asked
    away = simulate_fleet(requests, POOL, Spec(1, 10), by_pool(1.0, per_pod=False), decide).asked
    assert settled[-1] in (3, 4, 5) and away[-1] == 10


def test_a_fixed_fleet_is_what_an_autoscaler_makes_of_one_count():
    requests = steady(2, 100)
    fixed, scaled = simulate_fixed(requests, POOL, 3), simulate_fleet(requests, POOL, Spec(3, 3), Recorder(9), decide)
    assert (fixed.requests == scaled.requests).all() and (fixed.asked == scaled.asked).all()
    assert fixed.replica_hours == scaled.replica_hours
