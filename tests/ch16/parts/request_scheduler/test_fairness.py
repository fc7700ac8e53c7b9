"""Virtual token counters against a plain dictionary, and what they promise."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ch16.parts.request_scheduler.fairness import TokenCounters

TENANTS = st.sampled_from("abcdef")


class AgainstADictionary(RuleBasedStateMachine):
    """The paper's rules; every counter kept for ever, the least found by looking at all."""

    def __init__(self):
        super().__init__()
        self.ours, self.served, self.active, self.last = TokenCounters(), {}, [], None

    @rule(tenant=TENANTS)
    def join(self, tenant):
        if tenant not in self.active:
            waiting = [self.served[name] for name in self.active]
            level = min(waiting) if waiting else self.served.get(self.last, 0.0)
            self.served[tenant] = max(self.served.get(tenant, 0.0), level)
            self.active.append(tenant)
            self.ours.join(tenant)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def leave(self, data):
        tenant = data.draw(st.sampled_from(sorted(self.active)))
        self.active.remove(tenant)
        self.last = tenant
        self.ours.leave(tenant)

    @rule(tenant=TENANTS, tokens=st.integers(0, 9))
    def charge(self, tenant, tokens):
        if tenant in self.served:
            self.served[tenant] += tokens
            self.ours.charge(tenant, tokens)

    @invariant()
    def the_least(self):
        if self.active:
            assert self.ours.least() == min(self.active, key=self.served.__getitem__), "of equals the first to wait"


TestAgainstADictionary = AgainstADictionary.TestCase


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 10)), min_size=1, max_size=300))
def test_tenants_that_always_wait_stay_close(order):
    """Served by whoever has least: two that wait all the time never differ by more than one request."""
    counters, served = TokenCounters(), dict.fromkeys("abc", 0)
    for name in served:
        counters.join(name)
    for _, tokens in order:
        name = counters.least()
        served[name] += tokens
        counters.charge(name, tokens)
        assert max(served.values()) - min(served.values()) <= 10


def test_idle_tenants_are_forgotten_but_not_their_debts():
    counters = TokenCounters()
    counters.join("waits")
    counters.charge("debtor", 1000.0)
    for i in range(10_000):
        counters.join(f"t{i}")
        counters.charge(f"t{i}", 0.01)
        counters.leave(f"t{i}")
        counters.charge("waits", 0.02)
    assert len(counters._served) < 200 and len(counters._heap) < 200
    counters.join("debtor")
    assert counters.least() == "waits"


def test_tenants_that_come_once_to_an_empty_queue_are_forgotten():
    counters = TokenCounters()
    for i in range(10_000):
        counters.join(f"t{i}")
        counters.charge(f"t{i}", 5)
        counters.leave(f"t{i}")
    assert len(counters._served) < 200


def test_a_newcomer_is_lifted_to_what_the_last_has_been_served_since():
    """Tokens of an answer that are charged after its tenant stopped waiting count, too."""
    counters = TokenCounters()
    counters.join("a")
    counters.leave("a")
    counters.charge("a", 100)
    counters.join("b")
    counters.join("a")
    counters.charge("b", 1)
    assert counters.least() == "a"


def test_of_equals_the_one_that_waits_longer_goes_first():
    counters = TokenCounters()
    for name in ("z", "a"):
        counters.join(name)
    assert counters.least() == "z"
