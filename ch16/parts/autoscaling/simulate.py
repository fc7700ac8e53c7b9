"""A fleet of replicas, scraped and scaled: the autoscaler's turn every interval, the requests in between."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ch16.parts.autoscaling.hpa import History, PodsMetric, PoolMetric, Spec
from ch16.parts.autoscaling.records import DRAINING, OFF, REPLICA, SERVING, SLOT
from ch16.parts.autoscaling.signals import Sample, Scaler
from common.costs import Costs

INTERVAL_S = 15.0  # of Prometheus' scrapes and of the controller's turns

# One turn of the controller: spec, history, seconds, replicas, metrics -> replicas from now on, history.
Decide = Callable[[Spec, History, float, int, Sequence[PodsMetric | PoolMetric]], tuple[int, History]]


@dataclass(frozen=True)
class Pool:
    """What all replicas have in common."""

    costs: Costs
    slots: int  # requests decoded together
    kv_tokens: int  # capacity of the KV cache
    cold_start_s: float  # from asking for a replica to its first request


@dataclass(frozen=True)
class Outcome:
    """The times of the requests, and the fleet at each turn of the autoscaler."""

    requests: np.ndarray  # [N] of REQUEST
    asked: np.ndarray  # [turns], replicas from each turn on
    samples: list[list[Sample]]  # [turns][replicas that were ready]
    replica_hours: float  # paid for, cold starts and draining included

    @property
    def ttft_s(self) -> np.ndarray:
        """Time to first token of each request."""
        return self.requests["first_s"] - self.requests["at_s"]

    @property
    def flaps(self) -> int:
        """How often scaling turned from up to down or from down to up."""
        changes = np.sign(np.diff(self.asked))
        return int(np.count_nonzero(np.diff(changes[changes != 0])))


class Fleet:
    """Replicas that come, serve and go."""

    def __init__(self, requests: np.ndarray, pool: Pool) -> None:
        self.requests, self._pool, self._sent = requests.copy(), pool, 0
        self._replicas = np.zeros(0, REPLICA)
        self._slots = np.zeros((0, pool.slots), SLOT)
        self._scraped: dict[tuple[int, float], tuple[float, float]] = {}
        self._gone_s = 0.0  # seconds of replicas that are gone

    def start(self, count: int, now: float, ready_s: float) -> None:
        """Ask for `count` more replicas, which take requests from `ready_s` on."""
        if np.count_nonzero(self._replicas["state"] == OFF) < count:
            self._replicas = np.concatenate([self._replicas, np.zeros(count, REPLICA)])
            self._slots = np.concatenate([self._slots, np.zeros((count, self._pool.slots), SLOT)])
        new = np.zeros((), REPLICA)
        new["state"], new["started_s"], new["ready_s"] = SERVING, now, ready_s
        self._replicas[np.flatnonzero(self._replicas["state"] == OFF)[:count]] = new

    def stop(self, count: int) -> None:
        """Let `count` replicas drain, as a ReplicaSet chooses them: those that are not ready, then the youngest."""
        serving = np.flatnonzero(self._replicas["state"] == SERVING)
        order = sorted(serving, key=lambda row: (-self._replicas[row]["ready_s"], -row))
        self._replicas["state"][order[:count]] = DRAINING

    def advance(self, now: float) -> None:
        """Serve until `now`; a replica that has drained is gone, and is paid for until `now`."""
        from ch16.parts.autoscaling.replica import advance  # not before the engine has started, see there

        costs = astuple(self._pool.costs)
        self._sent = advance(self._replicas, self._slots, self.requests, self._sent, costs, now)
        drained = (self._replicas["state"] == DRAINING) & (self._replicas["running"] + self._replicas["waiting"] == 0)
        if drained.any():
            self._gone_s += float((now - self._replicas["started_s"][drained]).sum())
            self._replicas["state"][drained] = OFF

    def scrape(self, now: float) -> dict[tuple[int, float], Sample]:
        """A sample of each replica that is ready, by its identity."""
        samples, before, self._scraped = {}, self._scraped, {}
        for row, replica in enumerate(self._replicas.tolist()):
            state, started_s, ready_s, clock, step, running, waiting, _, _, held, busy_s = replica
            if state == SERVING and ready_s <= now:
                busy_s -= max(0.0, clock - now)  # of the step that is under way
                then_s, then_busy_s = before.get((row, started_s), (ready_s, 0.0))
                gpu = (busy_s - then_busy_s) / (now - then_s) if now > then_s else 0.0
                kv = (held + step * running) / self._pool.kv_tokens
                samples[row, started_s] = Sample(waiting, running, gpu, kv)
                self._scraped[row, started_s] = (now, busy_s)
        return samples

    def replica_s(self, now: float) -> float:
        """Seconds of replicas paid for until `now`, cold starts and draining included."""
        paid = self._replicas[self._replicas["state"] != OFF]
        return self._gone_s + float((now - paid["started_s"]).sum())


def simulate_fleet(requests: np.ndarray, pool: Pool, spec: Spec, scaler: Scaler, decide: Decide) -> Outcome:
    """Serve `requests` [N] (of REQUEST, by arrival), scaled by `decide` on the metrics that `scaler` makes of scrapes.

    A turn sees the scrape before the last one: values are `INTERVAL_S` old. Replicas without one count as missing.
    The fleet begins with the fewest replicas, all ready.
    """
    fleet, history, current = Fleet(requests, pool), History(), spec.min_replicas
    fleet.start(current, 0.0, 0.0)
    asked, samples, before = [], [], {}
    for turn in range(math.ceil(requests["at_s"][-1] / INTERVAL_S) + 1):
        now = INTERVAL_S * (turn + 1)
        fleet.advance(now)
        scraped = fleet.scrape(now)
        seen = [before[name] for name in scraped if name in before]
        wanted, history = decide(spec, history, now, current, scaler(seen, current - len(seen), len(scraped)))
        if wanted > current:
            fleet.start(wanted - current, now, now + pool.cold_start_s)
        elif wanted < current:
            fleet.stop(current - wanted)
        current, before = wanted, scraped
        asked.append(current)
        samples.append(list(scraped.values()))
    hours = fleet.replica_s(now) / 3600
    fleet.advance(math.inf)
    return Outcome(fleet.requests, np.array(asked), samples, hours)


def simulate_fixed(requests: np.ndarray, pool: Pool, replicas: int) -> Outcome:
    """Serve `requests` by a fleet that is never scaled."""
    keep: Decide = lambda spec, history, now_s, current, metrics: (current, history)  # noqa: E731
    return simulate_fleet(requests, pool, Spec(replicas, replicas), lambda samples, missing, ready: [], keep)
