import pytest

from ch16.parts.moe_benchmark.picture import plot_patterns, plot_ranks
from common.gpu import detect


def pattern(name, tokens, cost, **ranks):
    return {"pattern": name, "tokens": tokens, "load": [3, 2, 1], "max_mean": 1.5, "cost_percent": cost, **ranks}


@pytest.mark.parametrize("ranks", [{}, {"rank_cost_percent": 60.0}])
def test_patterns(ranks, tmp_path):
    names = ("balanced", "uniform", "zipf", "hot", "trained, evenest", "trained, most uneven")
    rows = [pattern(name, tokens, 9.0, **ranks) for tokens in (16, 512) for name in names]
    plot_patterns(str(tmp_path / "moe.png"), rows, "a layer", detect("cpu"))
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens", [(8,), (8, 64), (8, 64, 512)])
def test_ranks(tokens, tmp_path):
    parts = {"compute_ms": 2.0, "imbalance_ms": 1.0, "exchange_ms": 1.0, "rest_ms": -0.1, "step_ms": 3.9}
    rows = [{"pattern": name, "tokens": count, **parts} for count in tokens for name in ("balanced", "zipf")]
    plot_ranks(str(tmp_path / "ranks.png"), rows, "a layer", detect("cpu"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
