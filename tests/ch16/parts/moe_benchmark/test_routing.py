import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark import routing as module
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    expert_load,
    load_balance,
    make_routing,
    measure_patterns,
    rank_load,
    rank_part,
    rows_exchanged,
)
from common.cli import CannotRun
from common.timing import Timing


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


@given(st.sampled_from(PATTERNS), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_parts_of_all_ranks_add_up_to_the_layer(pattern, ranks, tokens):
    torch.manual_seed(tokens)
    experts = Experts.random(ExpertSizes(16, 8, 8, gated=True), dtype=torch.float32)
    x, routing = torch.randn(tokens, 16), make_routing(pattern, tokens, 8, 3, seed=tokens)
    total, rows = torch.zeros(tokens, 16), 0
    for rank in range(ranks):
        owner, local = rank_part(routing, 8, rank, ranks)
        shard = experts.part(rank * 8 // ranks, 8 // ranks)
        rows += len(owner)
        if len(owner):
            global_expert = local.experts + rank * 8 // ranks
            weight = (routing.weights[owner] * (routing.experts[owner] == global_expert)).sum(1, keepdim=True)
            total.index_add_(0, owner, weight * grouped(x[owner], shard, local))
    assert rows == tokens * 3 and torch.allclose(total, grouped(x, experts, routing), atol=1e-5)


def test_ranks_must_divide():
    with pytest.raises(CannotRun, match="8 experts do not divide by 3 ranks"):
        rank_part(Routing(torch.zeros(1, 1).long(), torch.ones(1, 1)), 8, 0, 3)


@pytest.mark.parametrize("experts", [16, 12])
def test_rows_of_patterns(experts):
    """12 experts do not divide by 8 ranks: no figures of ranks then."""
    x, layer = torch.randn(40, 32, dtype=torch.bfloat16), Experts.random(ExpertSizes(32, 16, experts, gated=True))
    routings = {name: make_routing(name, 40, experts, 2) for name in PATTERNS}
    rows = measure_patterns(routings, grouped, x, layer, "cpu", repeats=2)
    assert [row["pattern"] for row in rows] == list(PATTERNS)
    assert all(row["ms"] > 0 and sum(row["load"]) == 80 for row in rows)
    assert rows[0]["cost_percent"] == rows[0]["spread_percent"] == 0 and rows[0]["max_mean"] < rows[2]["max_mean"]
    assert all(("rank_ms" in row) == (experts == 16) for row in rows)


def test_a_cost_knows_how_much_it_differs_from_turn_to_turn(monkeypatch):
    """Zipf takes 1.1, 1.2, 1.3 times as long as balanced routing in the same turn, whatever the turn itself takes."""
    took = {"balanced": Timing((1.0, 2.0, 4.0)), "zipf": Timing((1.1, 2.4, 5.2))}
    monkeypatch.setattr(module, "measure_together", lambda works, *_, **__: took)
    x, layer = torch.randn(8, 32, dtype=torch.bfloat16), Experts.random(ExpertSizes(32, 16, 12, gated=True))
    routings = {name: make_routing(name, 8, 12, 2) for name in took}
    even, zipf = measure_patterns(routings, grouped, x, layer, "cpu", repeats=3)
    assert (even["cost_percent"], even["spread_percent"]) == (0, 0)
    assert zipf["cost_percent"] == pytest.approx(20) and zipf["spread_percent"] == pytest.approx(100 * 0.1 / 1.2)
