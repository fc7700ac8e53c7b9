import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.load_test.knee import GOOD_PERCENT, find_knee


def server(capacity, tried=None):
    def measure(rate):
        if tried is not None:
            tried.append(rate)
        return {"rate": rate, "good_percent": 100.0 if rate <= capacity else GOOD_PERCENT - 1}

    return measure


@given(st.floats(0.5, 12), st.integers(0, 6))
def test_lies_between_the_last_good_and_the_first_bad(capacity, refine):
    knee, rows = find_knee(server(capacity), [1, 2, 4, 8], refine)
    assert knee <= capacity
    assert [row["rate"] for row in rows] == sorted(row["rate"] for row in rows)
    good = [row["rate"] for row in rows if row["rate"] <= capacity]
    assert knee == max(good, default=0.0)
    if capacity < 8 and refine:
        bad = min(row["rate"] for row in rows if row["rate"] > capacity)
        widest = max(1, 4 if capacity >= 4 else 2 if capacity >= 2 else 1)
        assert bad - knee == pytest.approx(widest / 2**refine)


def test_two_bad_rates_are_enough():
    tried = []
    find_knee(server(1.5, tried), [1, 2, 4, 8], 0)
    assert tried == [1, 2, 4]


def test_a_good_rate_above_a_bad_one_is_luck():
    good = {1: 100, 2: 80, 3: 100}
    knee, rows = find_knee(lambda rate: {"good_percent": good[rate]}, [1, 2, 3], 0)
    assert knee == 1 and len(rows) == 3
