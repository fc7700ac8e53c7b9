"""The scheduler against a plain list for every policy, its bounds, threads, and the lab on the real engine."""

import itertools
import math
import queue
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ch16.parts.request_scheduler import waiting
from ch16.parts.request_scheduler.mix import bursty_mix
from ch16.parts.request_scheduler.simulate import Clock
from ch16.parts.request_scheduler.waiting import SLACK
from ch16.request_scheduler import POLICIES, InferenceScheduler, PrioritizedRequest, QueueFull, simulated_answers
from common.costs import Costs

# ---- against a plain list ----


class Twin:
    """The same rules by looking at every waiting request; counters as in the paper, kept for ever."""

    def __init__(self, ageing_s, fair, max_queue):
        self.ageing_s, self.fair, self.max_queue = ageing_s, fair, max_queue
        self.waiting, self.served, self.last, self.number = [], {}, None, 0
        self.since, self.joined = {}, 0

    def level(self):
        if self.since:
            return min(self.served[name] for name in self.since)
        return self.served.get(self.last, 0.0)

    def add(self, now, priority, tokens, tenant, deadline):
        expired = self.expire(now)
        mine = sum(entry["tenant"] == tenant for entry in self.waiting) if self.fair else 0
        if self.max_queue - len(self.waiting) <= mine:
            return None, expired
        if tenant not in self.since:
            self.served[tenant] = max(self.served.get(tenant, 0.0), self.level())
            self.since[tenant] = self.joined
            self.joined += 1
        key = (priority, self.number) if self.ageing_s == math.inf else (now + priority * self.ageing_s, self.number)
        entry = {"key": key, "name": self.number, "tokens": tokens, "tenant": tenant, "deadline": deadline}
        self.waiting.append(entry)
        self.number += 1
        return entry, expired

    def remove(self, entry):
        self.waiting.remove(entry)
        if all(other["tenant"] != entry["tenant"] for other in self.waiting):
            del self.since[entry["tenant"]]
            self.last = entry["tenant"]

    def expire(self, now):
        late = sorted((e for e in self.waiting if e["deadline"] <= now), key=lambda e: (e["deadline"], e["name"]))
        for entry in late:
            self.remove(entry)
        return [entry["name"] for entry in late]

    def next(self):
        candidates = self.waiting
        if self.fair and candidates:
            tenant = min(self.since, key=lambda name: (self.served[name], self.since[name]))
            candidates = [entry for entry in candidates if entry["tenant"] == tenant]
        return min(candidates, key=lambda entry: entry["key"], default=None)

    def take(self, now, count, max_tokens):
        expired = self.expire(now)
        batch, tokens = [], 0
        while len(batch) < count and (entry := self.next()):
            if batch and max_tokens is not None and tokens + entry["tokens"] > max_tokens:
                break
            self.served[entry["tenant"]] += entry["tokens"] if self.fair else 0
            self.remove(entry)
            tokens += entry["tokens"]
            batch.append(entry["name"])
        return batch, expired


class AgainstAList(RuleBasedStateMachine):
    """Any order of calls, by any policy: the same requests in the same order, with heaps compacted often or never."""

    @initialize(
        ageing_s=st.sampled_from([0.0, 0.5, 3.0, math.inf]),
        fair=st.booleans(),
        max_queue=st.integers(1, 12),
        slack=st.sampled_from([0, 64]),
    )
    def start(self, ageing_s, fair, max_queue, slack):
        waiting.SLACK = slack
        self.clock, self.expired, self.due, self.handles = Clock(), [], [], {}
        self.scheduler = InferenceScheduler(ageing_s, fair, max_queue, self.expired.append, self.clock)
        self.twin = Twin(ageing_s, fair, max_queue)

    def teardown(self):
        waiting.SLACK = SLACK

    @rule(
        wait=st.sampled_from([0.0, 0.25, 2.0]),
        priority=st.integers(-3, 3),
        tokens=st.integers(1, 9),
        tenant=st.sampled_from("abc"),
        patience=st.sampled_from([math.inf, 0.5, 4.0]),
    )
    def add(self, wait, priority, tokens, tenant, patience):
        self.clock.now += wait
        deadline, number = self.clock.now + patience, self.twin.number
        entry, expired = self.twin.add(self.clock.now, priority, tokens, tenant, deadline)
        self.due += expired
        call = {"tokens": tokens, "tenant": tenant, "deadline": None if patience == math.inf else deadline}
        if entry is None:
            with pytest.raises(QueueFull):
                self.scheduler.add_request(number, priority, **call)
        else:
            self.handles[number] = (self.scheduler.add_request(number, priority, **call), entry)

    @rule(wait=st.sampled_from([0.0, 1.0]), count=st.integers(1, 5), max_tokens=st.none() | st.integers(1, 20))
    def take(self, wait, count, max_tokens):
        self.clock.now += wait
        batch, expired = self.twin.take(self.clock.now, count, max_tokens)
        self.due += expired
        assert self.scheduler.get_next_batch(count, max_tokens) == batch
        assert all(self.handles[name][0].state == "taken" for name in batch)

    @rule(data=st.data())
    def cancel(self, data):
        if self.handles:
            handle, entry = self.handles[data.draw(st.sampled_from(sorted(self.handles)))]
            self.due += self.twin.expire(self.clock.now)
            waits = any(entry is other for other in self.twin.waiting)
            assert self.scheduler.cancel(handle) == waits
            if waits:
                self.twin.remove(entry)
                assert handle.state == "cancelled"

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(0, 20))
    def charge(self, tenant, tokens):
        if self.twin.fair and tenant in self.twin.served:
            self.scheduler.charge(tenant, tokens)
            self.twin.served[tenant] += tokens

    @invariant()
    def the_same(self):
        if hasattr(self, "scheduler"):
            assert len(self.scheduler) == len(self.twin.waiting)
            assert [item.request for item in self.expired] == self.due
            assert all(item.state == "expired" for item in self.expired)
            assert all(self.handles[entry["name"]][0].state == "waiting" for entry in self.twin.waiting)


TestAgainstAList = AgainstAList.TestCase


# ---- what it promises ----


def test_the_chapters_usage():
    scheduler = InferenceScheduler()
    for name, priority in (("batch", 20), ("urgent", 0), ("normal", 10), ("urgent too", 0)):
        scheduler.add_request({"prompt": name}, priority=priority)
    batch = scheduler.get_next_batch(max_batch_size=32)
    assert [request["prompt"] for request in batch] == ["urgent", "urgent too", "normal", "batch"]
    assert scheduler.get_next_batch() == [] and len(scheduler) == 0
    assert sorted([PrioritizedRequest(1, "b"), PrioritizedRequest(0, "a", 9)])[0].request == "a"


@given(
    st.lists(st.tuples(st.floats(0, 5), st.sampled_from([0, 1, 10])), min_size=1, max_size=60),
    st.floats(0, 2),
    st.integers(1, 4),
    st.randoms(),
)
def test_nobody_is_overtaken_by_who_comes_later_than_ageing_allows(arrivals, ageing_s, batch, rng):
    """While requests come and go at random: a later one never overtakes by more than the difference in priority."""
    clock = Clock()
    scheduler = InferenceScheduler(ageing_s, clock=clock)
    waiting = set()

    def take():
        for name in scheduler.get_next_batch(batch):
            waiting.discard(name)
            for earlier in waiting:
                assert name[0] - earlier[0] <= (earlier[1] - name[1]) * ageing_s + 1e-9

    for i, (arrival, priority) in enumerate(sorted(arrivals)):
        clock.now = arrival
        scheduler.add_request((arrival, priority, i), priority)
        waiting.add((arrival, priority, i))
        if rng.random() < 0.3:
            take()
    while waiting:
        take()


def test_without_arguments_it_is_the_chapters_strict_priority():
    """However long a request has waited, one with a lower number goes first."""
    clock = Clock()
    scheduler = InferenceScheduler(clock=clock)
    scheduler.add_request("patient", 1)
    clock.now = 1e9
    scheduler.add_request("urgent", 0)
    assert scheduler.get_next_batch() == ["urgent", "patient"]


def test_strict_priority_starves_and_ageing_does_not():
    """An urgent request a second, one served a second: the patient one waits for ever, or ten seconds a level."""
    for ageing_s, served in ((math.inf, False), (10.0, True)):
        clock = Clock()
        scheduler = InferenceScheduler(ageing_s, clock=clock)
        scheduler.add_request("patient", 1)
        out = []
        for clock.now in range(1, 100):
            scheduler.add_request(clock.now, 0)
            out += scheduler.get_next_batch(1)
        assert ("patient" in out) == served and (not served or out.index("patient") == 9)


def test_a_heavy_tenant_cannot_crowd_out_a_light_one():
    scheduler = InferenceScheduler(0.0, fair=True)
    for i in range(100):
        scheduler.add_request(("heavy", i), tokens=10, tenant="heavy")
    scheduler.add_request(("light", 0), tokens=10, tenant="light")
    assert ("light", 0) in scheduler.get_next_batch(2)


def test_answers_are_charged():
    scheduler = InferenceScheduler(0.0, fair=True)
    for tenant in "ab":
        for i in range(3):
            scheduler.add_request((tenant, i), tenant=tenant)
    assert scheduler.get_next_batch(1) == [("a", 0)]
    scheduler.charge("b", 50)  # a long answer
    assert scheduler.get_next_batch(2) == [("a", 1), ("a", 2)]


def test_what_does_not_fit_is_not_overtaken():
    scheduler = InferenceScheduler()
    for name, tokens in (("a", 4), ("large", 9), ("small", 1)):
        scheduler.add_request(name, tokens=tokens)
    assert [scheduler.get_next_batch(max_tokens=5) for _ in range(3)] == [["a"], ["large"], ["small"]]


def test_memory_is_given_back():
    """Cancelled and expired requests do not stay in the heaps, nor tenants that went away."""
    clock = Clock()
    scheduler = InferenceScheduler(fair=True, max_queue=50, clock=clock)
    keep = scheduler.add_request("keep", 99, tenant="keep")
    for i in range(20_000):
        clock.now = float(i)
        item = scheduler.add_request(i, tenant=f"t{i % 7}", deadline=i + (0.5 if i % 2 else 1e9))
        if i % 2 == 0:
            scheduler.cancel(item)
    waits = scheduler._queue
    assert len(waits.deadlines._entries) < 200
    assert sum(len(heap._entries) for heap in waits.heaps.values()) < 300
    assert keep.state == "waiting" and len(scheduler) <= 2


@pytest.mark.parametrize(
    ("make", "call"),
    [
        ({"ageing_s": -1.0}, None),
        ({"ageing_s": math.nan}, None),
        ({"max_queue": 0}, None),
        ({}, lambda s: s.add_request("x", tokens=0)),
        ({}, lambda s: s.add_request("x", deadline=math.nan)),
        ({}, lambda s: s.add_request("x", priority=math.nan)),
        ({}, lambda s: s.add_request("x", priority=math.inf)),
        ({}, lambda s: s.add_request("x", tokens=math.nan)),
        ({}, lambda s: s.charge("t", math.nan)),
        ({}, lambda s: s.get_next_batch(timeout_s=math.nan)),
        ({}, lambda s: s.cancel(InferenceScheduler().add_request("x"))),
        ({}, lambda s: s.get_next_batch(0)),
        ({}, lambda s: s.get_next_batch(1, max_tokens=0)),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(make, call):
    with pytest.raises(ValueError):
        scheduler = InferenceScheduler(**make)
        try:
            call(scheduler)
        finally:
            assert len(scheduler) == 0
            scheduler.add_request("after")
            assert scheduler.get_next_batch() == ["after"]


# ---- threads ----


def test_threads_lose_and_double_nothing():
    scheduler = InferenceScheduler(max_queue=100_000)
    taken, count = queue.Queue(), 2000

    def produce(name):
        for i in range(count):
            item = scheduler.add_request((name, i), priority=i % 3, tenant=str(name))
            if i % 10 == 0 and scheduler.cancel(item):
                taken.put((name, i))

    def consume():
        while batch := scheduler.get_next_batch(7, timeout_s=None):
            for request in batch:
                taken.put(request)

    producers = [threading.Thread(target=produce, args=(name,)) for name in range(4)]
    consumers = [threading.Thread(target=consume) for _ in range(3)]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join()
    scheduler.close()
    for thread in consumers:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(taken.queue) == sorted(itertools.product(range(4), range(count))) and len(scheduler) == 0
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.add_request("late")


def test_a_waiting_thread_wakes_up():
    scheduler, got = InferenceScheduler(), []
    thread = threading.Thread(target=lambda: got.extend(scheduler.get_next_batch(timeout_s=None)), daemon=True)
    thread.start()
    while not scheduler._changed._waiters:
        time.sleep(0.001)
    scheduler.add_request("x")
    thread.join(30)
    assert got == ["x"]
    assert scheduler.get_next_batch(timeout_s=0.01) == []


def test_closing_wakes_up_and_strands_nobody():
    scheduler, got = InferenceScheduler(), []

    def consume():
        while batch := scheduler.get_next_batch(1, timeout_s=None):
            got.extend(batch)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    while not scheduler._changed._waiters:
        time.sleep(0.001)
    with scheduler._changed:  # all of it before the consumer runs
        cancelled = scheduler.add_request("cancelled")
        scheduler.cancel(cancelled)
        for name in "ab":
            scheduler.add_request(name)
        scheduler.close()
    thread.join(30)
    assert got == ["a", "b"] and not thread.is_alive()


def test_callbacks_run_outside_the_lock_and_lose_nothing(caplog):
    """Who is told of an expired request may wait for another thread that uses the scheduler; or fail."""
    clock, lengths = Clock(), []

    def told(item):
        other = threading.Thread(target=lambda: lengths.append(scheduler.add_request(item.request + " again").number))
        other.start()
        other.join(30)
        assert not other.is_alive()
        raise OSError("nobody listens")

    scheduler = InferenceScheduler(on_expired=told, clock=clock)
    scheduler.add_request("late", deadline=1.0)
    scheduler.add_request("in time")
    clock.now = 2.0
    assert scheduler.get_next_batch() == ["in time"] and lengths == [2]
    assert scheduler.get_next_batch() == ["late again"] and "on_expired failed" in caplog.text


def test_a_heavy_tenant_cannot_take_all_places():
    scheduler = InferenceScheduler(fair=True, max_queue=16)
    for tenant in ("heavy", "light", "third"):
        with pytest.raises(QueueFull):
            for i in range(20):
                scheduler.add_request(i, tenant=tenant)
    assert [scheduler._queue.heaps[name].live for name in ("heavy", "light", "third")] == [8, 4, 2]


# ---- the lab ----


def test_speed_grows_slowly_with_depth():
    """O(log n), by counting comparisons: a pair among 100,000 costs less than four times that among 100."""

    class Counted(int):
        compared = 0

        def __lt__(self, other):
            Counted.compared += 1
            return int(self) < int(other)

    costs = []
    for depth in (100, 100_000):
        scheduler, rng = InferenceScheduler(math.inf, max_queue=10**6), random.Random(0)
        for _ in range(depth):
            scheduler.add_request(None, Counted(rng.randrange(10**9)))
        Counted.compared = 0
        for _ in range(200):
            scheduler.add_request(None, Counted(rng.randrange(10**9)))
            scheduler.get_next_batch(1)
        costs.append(Counted.compared / 200)
    assert 0 < costs[1] < 4 * costs[0]


@pytest.mark.parametrize("count", [1, 3, 200])
def test_the_policies_serve_the_same_requests(count):
    jobs = bursty_mix(count, 100.0, math.inf, 5, 10, seed=0)
    policies = {name: arguments(1.0) for name, arguments in POLICIES.items()}
    runs = simulated_answers(jobs, Costs(0.01, 0.002, 0.001), 4, policies)
    assert list(runs) == list(POLICIES)
    assert all(sorted(map(id, jobs)) == sorted(id(answer.job) for answer in answers) for answers in runs.values())


@pytest.mark.slow
def test_the_script(quick_run):
    """On the real engine: urgent requests do not wait, and with ageing nobody waits longer than the bound."""
    done = quick_run("python3", "ch16/request_scheduler.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = done.json["tables"]
    live = tables["live"]["rows"]
    assert [row["group"] for row in live] == 3 * ["1 high", "2 normal", "3 low"]
    assert sum(row["count"] for row in live[:3]) == sum(row["count"] for row in live[3:6])
    simulated = {(row["policy"], row["group"]): row for row in tables["simulated"]["rows"]}
    assert simulated["priority with ageing", "3 low"]["over_bound"] == 0
    assert simulated["strict priority", "1 high"]["p99_s"] < simulated["first come, first served", "1 high"]["p99_s"]
    heavy, light = tables["tenants"]["rows"][2:]
    assert light["p99_s"] < heavy["p99_s"]
