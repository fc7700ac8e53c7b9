import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.moe_benchmark.experts import Routing
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    expert_load,
    load_balance,
    make_routing,
    rank_load,
    rows_exchanged,
)
from common.cli import CannotRun


@given(st.sampled_from(PATTERNS), st.integers(1, 60), st.integers(1, 20), st.data())
def test_choices_are_valid(pattern, tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    routing = make_routing(pattern, tokens, experts, top_k, seed=tokens)
    assert routing.experts.shape == routing.weights.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k and set(row) <= set(range(experts)) for row in routing.experts.tolist())
    assert (
        torch.allclose(routing.weights.sum(1), torch.ones(tokens))
        and expert_load(routing, experts).sum() == tokens * top_k
    )


def test_patterns_are_what_they_are_called():
    load = {p: expert_load(make_routing(p, 20_000, 16, 2), 16) for p in PATTERNS}
    assert load["balanced"].max() == load["balanced"].min()
    assert 1.0 < load["uniform"].max() / load["uniform"].mean() < 1.1
    assert load["hot"][0] == pytest.approx(10_000, rel=0.05)
    assert load["hot"][1:].max() / load["hot"][1:].mean() < 1.1
    first_draw = expert_load(make_routing("zipf", 20_000, 16, 1), 16)
    expected = 20_000 / np.arange(1, 17) / sum(1 / r for r in range(1, 17))  # of the expert of rank r
    assert sorted(first_draw, reverse=True) == pytest.approx(expected, rel=0.1)


def test_the_busiest_direction_of_an_exchange():
    """Two ranks of two tokens and two experts each: three rows leave the second rank, one leaves the first."""
    experts = torch.tensor([[0, 1], [1, 2], [0, 1], [0, 3]])
    assert rows_exchanged(Routing(experts, torch.ones(4, 2)), ranks=2, share=2) == 3
    alone = Routing(torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert rows_exchanged(alone, ranks=1, share=2) == 0


def test_a_seed_decides():
    one, two, three = (make_routing("zipf", 50, 8, 2, seed=s).experts.tolist() for s in (1, 1, 2))
    assert one == two != three


def test_measures_by_hand():
    row = load_balance([6, 2, 0, 0], capacity_factor=1.5)
    assert row["max_mean"] == 3.0
    assert row["cv"] == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert row["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert row["empty_percent"] == 50.0
    assert row["dropped_percent"] == pytest.approx(100 * 3 / 8)  # capacity 3: the busiest drops 3 of 8


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(sum))
def test_measures_have_their_bounds(load):
    row = load_balance(load)
    assert row["max_mean"] >= 1 and row["cv"] >= 0 and -1e-9 <= row["entropy"] <= 1 + 1e-9
    assert 0 <= row["empty_percent"] < 100 and 0 <= row["dropped_percent"] < 100
    assert (row["max_mean"] == 1) == (row["cv"] == 0)


def test_one_expert_for_all_has_no_entropy():
    row = load_balance([10, 0, 0])
    assert (row["entropy"], row["max_mean"]) == (0.0, 3.0)
    assert load_balance([5])["entropy"] == 1.0


def test_load_of_ranks():
    assert rank_load([1, 2, 3, 4], 2).tolist() == [3, 7]
    with pytest.raises(CannotRun, match="4 experts do not divide by 3 ranks"):
        rank_load([1, 2, 3, 4], 3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("uniform", 0, 8, 2), CannotRun),
        (("uniform", 4, 8, 9), CannotRun),
        (("uniform", 4, 8, 0), CannotRun),
        (("fair", 4, 8, 2), ValueError),
    ],
)
def test_bad_input(arguments, error):
    with pytest.raises(error):
        make_routing(*arguments)


@pytest.mark.parametrize("load", [[], [0, 0]])
def test_no_load_has_no_balance(load):
    with pytest.raises(ValueError):
        load_balance(load)
