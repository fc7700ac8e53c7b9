import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.costs import Costs, TimedStep, check_columns, check_rows, timed_steps
from common.load import EngineStep, Timeline

parts = st.floats(1e-6, 0.1)


@given(parts, parts, parts)
def test_a_fit_finds_the_costs_that_made_the_steps(base, sequence, prompt):
    costs = Costs(base, sequence, prompt)
    steps = [TimedStep(n, tokens, costs.step_s(n, tokens)) for n in (1, 4, 8) for tokens in (0, 40, 400)]
    found = Costs.fit(steps)
    for step in steps:
        assert found.step_s(step.sequences, step.prompt_tokens) == pytest.approx(step.seconds, rel=1e-6)


@given(st.floats(1e-6, 0.1), st.floats(0, 0.01), st.floats(0, 0.001))
def test_parts_are_found_again(base, sequence, prompt):
    true = Costs(base, sequence, prompt)
    steps = [TimedStep(n, tokens, true.step_s(n, tokens)) for n in (1, 2, 5, 8) for tokens in (0, 32, 64)]
    found = Costs.fit(steps)
    assert [found.base_s, found.sequence_s, found.prompt_token_s] == pytest.approx([base, sequence, prompt], abs=1e-9)


def test_short_steps_count_as_much_as_long_ones():
    """A long step that is 5% off changes what short steps cost by far less than 5%."""
    costs = Costs(0.012, 0.0006, 0.0003)
    steps = [TimedStep(n, tokens, costs.step_s(n, tokens)) for n in (1, 4, 8) for tokens in (*[0] * 20, 350 * n)]
    steps[-1] = TimedStep(8, 2800, 1.05 * steps[-1].seconds)
    assert Costs.fit(steps).step_s(8) == pytest.approx(costs.step_s(8), rel=0.005)


def test_no_cost_is_below_zero():
    found = Costs.fit([TimedStep(1, 0, 0.9), TimedStep(2, 0, 0.5), TimedStep(3, 0, 0.1)])
    assert found.sequence_s == 0 and 0.1 < found.base_s < 0.9
    assert found.base_s == pytest.approx((1 / 0.9 + 1 / 0.5 + 1 / 0.1) / (0.9**-2 + 0.5**-2 + 0.1**-2))  # anew, alone
    with pytest.raises(ValueError, match="cannot be found from 2 steps"):
        Costs.fit([TimedStep(1, 0, 1.0)] * 2)


def test_the_share_of_a_request():
    """Ten steps of 26 ms shared by eight slots, and five prompt tokens of 1 ms."""
    assert Costs(0.01, 0.002, 0.001).slot_s(8, 5, 10) == pytest.approx(0.26 / 8 + 0.005)


def test_a_prompt_counts_in_the_step_that_gave_its_first_token():
    steps = [EngineStep(1.0, 0.5, 1), EngineStep(2.0, 0.75, 3), EngineStep(3.0, 0.25, 2)]
    arrived = {"a": [1.0, 2.0], "b": [2.0, 3.0], "c": [2.0, 3.0]}
    found = timed_steps(Timeline(arrived=arrived, steps=steps), {"a": 10, "b": 7, "c": 5})
    assert found == [TimedStep(1, 10, 0.5), TimedStep(3, 12, 0.75), TimedStep(2, 0, 0.25)]


def test_the_check_says_how_far_off_a_simulation_is():
    (row,) = check_rows({"TTFT P50 s": (2.0, 1.5)})
    assert row == {"what": "TTFT P50 s", "real": 2.0, "simulated": 1.5, "error_percent": -25.0}
    assert [column.key for column in check_columns("a load")] == list(row)
