import pytest
import torch

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark import patterns
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes
from ch16.parts.moe_benchmark.patterns import measure_patterns
from ch16.parts.moe_benchmark.routing import PATTERNS, make_routing
from common.timing import Timing


@pytest.mark.parametrize("experts", [16, 12])
def test_rows(experts):
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
    monkeypatch.setattr(patterns, "measure_together", lambda works, *_, **__: took)
    x, layer = torch.randn(8, 32, dtype=torch.bfloat16), Experts.random(ExpertSizes(32, 16, 12, gated=True))
    routings = {name: make_routing(name, 8, 12, 2) for name in took}
    even, zipf = patterns.measure_patterns(routings, grouped, x, layer, "cpu", repeats=3)
    assert (even["cost_percent"], even["spread_percent"]) == (0, 0)
    assert zipf["cost_percent"] == pytest.approx(20) and zipf["spread_percent"] == pytest.approx(100 * 0.1 / 1.2)
