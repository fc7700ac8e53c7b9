"""The scheduler against a plain list for every policy, its bounds, threads, and the lab on the real engine."""

import itertools
import json
import math
import queue
import random
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ch16 import request_scheduler
from ch16.request_scheduler import InferenceScheduler, PrioritizedRequest, QueueFull, claim, speed_rows
from ch16.scheduling.simulate import Clock

SCRIPT = request_scheduler.__file__


# ---- against a plain list ----


class Twin:
    """The same rules by looking at every waiting request."""

    def __init__(self, ageing_s, fair, max_queue):
        self.ageing_s, self.fair, self.max_queue = ageing_s, fair, max_queue
        self.waiting, self.served, self.level, self.number = [], {}, 0.0, 0

    def tenants(self):
        return {entry["tenant"] for entry in self.waiting}

    def add(self, now, priority, tokens, tenant, deadline):
        self.expire(now)
        if len(self.waiting) >= self.max_queue:
            return None
        if tenant not in self.tenants():
            level = min((self.served[name] for name in self.tenants()), default=self.level)
            self.served[tenant] = max(self.served.get(tenant, 0.0), level)
        key = (priority, self.number) if self.ageing_s == math.inf else (now + priority * self.ageing_s, self.number)
        entry = {"key": key, "name": self.number, "tokens": tokens, "tenant": tenant, "deadline": deadline}
        self.waiting.append(entry)
        self.number += 1
        return entry

    def remove(self, entry):
        self.waiting.remove(entry)
        if entry["tenant"] not in self.tenants():
            self.level = self.served[entry["tenant"]]

    def expire(self, now):
        late = sorted((e for e in self.waiting if e["deadline"] <= now), key=lambda e: (e["deadline"], e["name"]))
        for entry in late:
            self.remove(entry)
        return [entry["name"] for entry in late]

    def next(self):
        of = self.waiting
        if self.fair and of:
            tenant = min(self.tenants(), key=lambda name: (self.served[name], name))
            of = [entry for entry in of if entry["tenant"] == tenant]
        return min(of, key=lambda entry: entry["key"], default=None)

    def take(self, now, count, max_tokens):
        self.expire(now)
        batch, tokens = [], 0
        while len(batch) < count and (entry := self.next()):
            if batch and max_tokens is not None and tokens + entry["tokens"] > max_tokens:
                break
            self.remove(entry)
            self.served[entry["tenant"]] += entry["tokens"] if self.fair else 0
            tokens += entry["tokens"]
            batch.append(entry["name"])
        return batch


class AgainstAList(RuleBasedStateMachine):
    """Any order of calls, by any policy: the same requests in the same order."""

    @initialize(ageing_s=st.sampled_from([0.0, 0.5, 3.0, math.inf]), fair=st.booleans(), max_queue=st.integers(1, 12))
    def start(self, ageing_s, fair, max_queue):
        self.clock, self.expired, self.handles = Clock(), [], {}
        self.ours = InferenceScheduler(ageing_s, fair, max_queue, self.expired.append, self.clock)
        self.twin = Twin(ageing_s, fair, max_queue)

    @rule(
        wait=st.sampled_from([0.0, 0.25, 2.0]), priority=st.integers(-3, 3), tokens=st.integers(1, 9),
        tenant=st.sampled_from("abc"), patience=st.sampled_from([math.inf, 0.5, 4.0]),
    )  # fmt: skip
    def add(self, wait, priority, tokens, tenant, patience):
        self.clock.now += wait
        deadline, number = self.clock.now + patience, self.twin.number
        entry = self.twin.add(self.clock.now, priority, tokens, tenant, deadline)
        call = {"tokens": tokens, "tenant": tenant, "deadline": deadline}
        if entry is None:
            with pytest.raises(QueueFull):
                self.ours.add_request(number, priority, **call)
        else:
            self.handles[number] = (self.ours.add_request(number, priority, **call), entry)

    @rule(wait=st.sampled_from([0.0, 1.0]), count=st.integers(1, 5), max_tokens=st.none() | st.integers(1, 20))
    def take(self, wait, count, max_tokens):
        self.clock.now += wait
        assert self.ours.get_next_batch(count, max_tokens) == self.twin.take(self.clock.now, count, max_tokens)

    @rule(data=st.data())
    def cancel(self, data):
        if self.handles:
            handle, entry = self.handles[data.draw(st.sampled_from(sorted(self.handles)))]
            waits = any(entry is one for one in self.twin.waiting)
            assert self.ours.cancel(handle) == waits
            if waits:
                self.twin.remove(entry)

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(0, 20))
    def charge(self, tenant, tokens):
        if self.twin.fair and tenant in self.twin.served:
            self.ours.charge(tenant, tokens)
            self.twin.served[tenant] += tokens

    @invariant()
    def as_many(self):
        if hasattr(self, "ours"):
            assert len(self.ours) == len(self.twin.waiting)
            states = {handle.state for handle, entry in self.handles.values() if entry in self.twin.waiting}
            assert states <= {"waiting"}


TestAgainstAList = AgainstAList.TestCase


# ---- what it promises ----


def test_the_chapters_usage():
    scheduler = InferenceScheduler()
    for name, priority in (("batch", 20), ("urgent", 0), ("normal", 10), ("urgent too", 0)):
        scheduler.add_request({"prompt": name}, priority=priority)
    batch = scheduler.get_next_batch(max_batch_size=32)
    assert [request["prompt"] for request in batch] == ["urgent", "urgent too", "normal", "batch"]
    assert scheduler.get_next_batch() == [] and len(scheduler) == 0
    assert sorted([PrioritizedRequest(1, 0, "b"), PrioritizedRequest(0, 9, "a")])[0].request == "a"


@given(
    st.lists(st.tuples(st.floats(0, 5), st.sampled_from([0, 1, 10])), min_size=1, max_size=60),
    st.floats(0, 2), st.integers(1, 4), st.randoms(),
)  # fmt: skip
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
    assert len(scheduler._deadlines) < 200 and sum(map(len, scheduler._queues.values())) < 300
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
            for one in batch:
                taken.put(one)

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
    found = list(taken.queue) + scheduler.get_next_batch(10**6)
    assert sorted(found) == sorted(itertools.product(range(4), range(count)))
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.add_request("late")


def test_a_waiting_thread_wakes_up():
    scheduler, got = InferenceScheduler(), []
    thread = threading.Thread(target=lambda: got.extend(scheduler.get_next_batch(timeout_s=60)))
    thread.start()
    scheduler.add_request("x")
    thread.join(30)
    assert got == ["x"]
    assert scheduler.get_next_batch(timeout_s=0.01) == []


def test_callbacks_run_outside_the_lock():
    """Who is told of an expired request may use the scheduler, to send it again for example."""
    clock = Clock()
    scheduler = InferenceScheduler(on_expired=lambda item: again.append(item.request), clock=clock)
    again = []
    scheduler.add_request("late", deadline=1.0)
    scheduler._on_expired = lambda item: scheduler.add_request(item.request)
    clock.now = 2.0
    assert scheduler.get_next_batch() == [] and scheduler.get_next_batch() == ["late"]


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


def test_speed_rows():
    rows = speed_rows(64)
    assert len(rows) == 9 and all(row["pairs_per_s"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["what"] == "queue.PriorityQueue"] == [1.0] * 3


def rows_of(ratio, throughput):
    shared = {"tokens_per_s": 100.0}
    fcfs = [{"group": f"{i} {k}", "p99_s": 4.0, "max_s": 5.0, **shared} for i, k in enumerate(("high", "low"))]
    urgent = [row | {"p99_s": 4.0 * ratio, "tokens_per_s": 100 * throughput} for row in fcfs]
    return fcfs + urgent + fcfs


@pytest.mark.parametrize(
    ("ratio", "throughput", "verdict"), [(0.2, 0.98, "holds"), (0.3, 1.0, "fails"), (0.1, 0.9, "fails")]
)
def test_the_claim(ratio, throughput, verdict):
    assert claim(rows_of(ratio, throughput)).verdict == verdict


@pytest.mark.slow
def test_the_script(tmp_path):
    """On the real engine: urgent requests do not wait, and with ageing nobody waits longer than the bound."""
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    command = [sys.executable, SCRIPT, "--quick", "--requests", "5000", "--dummy-weights", "tiny-llama", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = json.loads((tmp_path / "s.json").read_text())["tables"]
    live = tables["live"]["rows"]
    assert [row["group"] for row in live] == 3 * ["1 high", "2 normal", "3 low"]
    assert sum(row["count"] for row in live[:3]) == sum(row["count"] for row in live[3:6])
    simulated = {(row["policy"], row["group"]): row for row in tables["simulated"]["rows"]}
    assert simulated["priority with ageing", "3 low"]["over_bound"] == 0
    assert simulated["strict priority", "1 high"]["p99_s"] < simulated["first come, first served", "1 high"]["p99_s"]
    heavy, light = tables["tenants"]["rows"][2:]
    assert light["p99_s"] < heavy["p99_s"]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
