from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.load_balancer.breaker import CircuitBreaker


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def breaker(**kwargs):
    clock = Clock()
    return CircuitBreaker(failures=3, cooldown_s=1.0, longest_s=4.0, clock=clock, **kwargs), clock


def fail(it, times=1):
    for _ in range(times):
        it.ended(False, it.began())


def test_opens_after_failures_in_a_row():
    it, _ = breaker()
    fail(it, 2)
    it.ended(True, it.began())
    fail(it, 2)
    assert it.state == "closed" and it.allows()
    fail(it)
    assert it.state == "open" and not it.allows()


def test_one_trial_at_a_time_and_longer_each_time():
    it, clock = breaker()
    fail(it, 3)
    for cooldown in (1, 2, 4, 4):
        clock.now += cooldown - 0.01
        assert it.state == "open"
        clock.now += 0.01
        assert it.state == "half-open" and it.allows()
        trial = it.began()
        assert trial and not it.allows()
        it.ended(False, trial)
        assert it.state == "open"
    clock.now += 4
    it.ended(True, it.began())
    assert it.state == "closed" and it.allows()


def test_a_trial_whose_client_left_says_nothing():
    it, clock = breaker()
    fail(it, 3)
    clock.now = 1
    it.ended(None, it.began())
    assert it.state == "half-open" and it.allows()


def test_requests_from_before_it_opened_do_not_prolong_it():
    it, clock = breaker()
    began = [it.began() for _ in range(6)]
    for trial in began:
        it.ended(False, trial)
    clock.now = 1
    assert it.state == "half-open"


def test_a_server_that_came_back_starts_afresh():
    it, _ = breaker()
    fail(it, 5)
    it.reset()
    assert it.state == "closed" and it.allows()
    fail(it, 2)
    assert it.state == "closed"


EVENTS = st.lists(st.sampled_from(["begin", "ok", "fail", "left", "second"]), max_size=60)


@given(EVENTS)
def test_against_its_history(events):
    """The state, told from everything that happened so far."""
    it, clock = breaker()
    flying, history = [], []  # requests on their way; (time, ok, trial) of those that ended
    for event in events:
        if event == "second":
            clock.now += 0.5
        elif event == "begin":
            if it.allows():
                flying.append(it.began())
        elif flying:
            trial = flying.pop(0)
            it.ended({"ok": True, "fail": False, "left": None}[event], trial)
            history.append((clock.now, event, trial))
        state, trial_away = expected(history, clock.now, flying)
        assert it.state == state
        assert it.allows() == (state == "closed" or (state == "half-open" and not trial_away))


def expected(history, now, flying):
    in_a_row, opened, until = 0, 0, None
    for at, event, trial in history:
        if event == "ok":
            in_a_row, opened = 0, 0
        elif event == "fail":
            in_a_row += 1
            if trial or (not opened and in_a_row >= 3):
                until, opened = at + min(4.0, 2.0**opened), opened + 1
    return "closed" if not opened else "open" if now < until else "half-open", any(flying)
