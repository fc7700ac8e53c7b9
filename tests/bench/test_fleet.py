import pytest

from tests.bench.fleet import measure


def test_the_speed_is_that_of_a_day_of_a_million_requests():
    speed = measure(seed=0)
    assert speed["requests"] == pytest.approx(1_000_000, rel=0.01) and speed["hours"] == 24
    assert speed["per_s"] == pytest.approx(speed["requests"] / speed["seconds"])
