import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.autoscaling.search import Tried, best, find_target, missed_at_price


def proportional(target):
    """Twice the target, half the replicas; below ten replica-hours requests miss."""
    hours = 100 / target
    return Tried(target, max(0.0, 10 - hours), hours)


@given(st.floats(2, 60))
def test_spends_the_budget(budget):
    tried = find_target(proportional, 1, 100, budget, count=10, refine=4)
    found = best(tried, budget)
    assert [one.target for one in tried] == sorted({one.target for one in tried})
    assert found.hours <= budget
    assert found.missed_percent == pytest.approx(max(0.0, 10 - budget), abs=0.1 * budget)


def test_tries_no_target_twice():
    asked = []
    find_target(lambda target: asked.append(target) or Tried(target, 1.0, 1.0), 1, 2, 9, count=5)
    assert len(asked) == len(set(asked)) <= 5 + 3 * 2
    assert asked[:5] == [1.0, 1.19, 1.41, 1.68, 2.0]


def test_nothing_is_so_cheap():
    assert best([Tried(1, 0, 30), Tried(2, 50, 20)], 10) == Tried(2, 50, 20)


def test_of_equals_the_cheapest():
    assert best([Tried(1, 0, 9), Tried(2, 0, 8), Tried(3, 5, 1)], 10) == Tried(2, 0, 8)


POINTS = [Tried(1, 90, 10), Tried(2, 50, 20), Tried(3, 70, 25), Tried(4, 10, 30)]


@pytest.mark.parametrize(("hours", "missed"), [(5, 90), (10, 90), (15, 70), (20, 50), (25, 30), (30, 10), (99, 10)])
def test_targets_may_take_turns(hours, missed):
    assert missed_at_price(POINTS, hours) == pytest.approx(missed)


points = st.lists(st.builds(Tried, st.just(1.0), st.floats(0, 100), st.floats(1, 50)), min_size=1, max_size=8)


@given(points, st.floats(1, 50))
def test_no_target_is_better_than_what_taking_turns_gives(tried, hours):
    within = [one.missed_percent for one in tried if one.hours <= hours]
    if within:
        assert missed_at_price(tried, hours) <= min(within)
        assert missed_at_price(tried, hours) >= min(one.missed_percent for one in tried) - 1e-9
