import pytest

from ch16.parts.moe_benchmark.tables import prediction_claim, uneven_load_claim, validation_rows


def test_errors_of_a_prediction():
    predicted = {"tokens_per_s": 110.0, "decode_step_ms": 9.0, "prefill_s": 1.0}
    measured = {"tokens_per_s": 100.0, "itl_p50_ms": 10.0, "prefill_s": 1.0}
    assert [round(row["error_percent"]) for row in validation_rows(predicted, measured)] == [10, -10, 0]


def pattern(name, cost, rank_cost=None, max_mean=3.0):
    row = {"pattern": name, "tokens": 64, "max_mean": max_mean, "cost_percent": cost}
    return row if rank_cost is None else row | {"rank_cost_percent": rank_cost}


@pytest.mark.parametrize(
    ("rows", "verdict", "text"),
    [
        ([pattern("balanced", 0.0), pattern("zipf", 1.0, 40.0)], "holds", "+40% over several ranks"),
        ([pattern("zipf", -10.0, 2.0)], "fails", "+2%"),
        ([pattern("zipf", 1.0), pattern("hot", 90.0)], "fails", "zipf routing (simulated)"),
        ([pattern("zipf", 50.0), pattern("trained, most uneven", 3.0)], "fails", "trained, most uneven routing, 64"),
        ([pattern("zipf", 0.0), pattern("trained, most uneven", 3.0, 9.0)], "holds", "+9%"),
    ],
)
def test_uneven_load(rows, verdict, text):
    found = uneven_load_claim(rows, "over several ranks")
    assert found.verdict == verdict and text in found.measured


@pytest.mark.parametrize(
    ("costs", "verdict", "text"),
    [
        ([(0.0, 1.0, 8.0, 9.0)], "n/a", "+8% over 2 ranks"),
        ([(0.0, 9.0, 8.0, 7.0)], "holds", "+8% over 2 ranks"),
        ([(8.0, 9.0, 0.0, 1.0)], "n/a", "+8% on one device"),
        ([(8.0, 7.0, 0.0, 9.0)], "holds", "+8% on one device"),
        ([(9.0, 20.0, 6.0, 1.0)], "holds", "+6% over 2 ranks"),  # the other may be nothing, this one is something
        ([(1.0, 1.0, 9.0, 20.0)], "n/a", "+9% over 2 ranks"),
        ([(1.0, 0.5, 2.0, 0.5)], "fails", "+2% over 2 ranks"),
    ],
)
def test_a_cost_within_its_noise_decides_nothing(costs, verdict, text):
    rows = [
        pattern("zipf", cost, rank_cost) | {"spread_percent": spread, "rank_spread_percent": rank_spread}
        for cost, spread, rank_cost, rank_spread in costs
    ]
    found = uneven_load_claim(rows, "over 2 ranks")
    assert found.verdict == verdict and text in found.measured


@pytest.mark.parametrize(("error", "verdict"), [(-15.0, "holds"), (14.0, "holds"), (15.1, "fails"), (-40.0, "fails")])
def test_prediction(error, verdict):
    rows = [{"what": "output tok/s", "predicted": 1000.0, "measured": 900.0, "error_percent": error}]
    found = prediction_claim(rows, "")
    assert found.verdict == verdict and "predicted 1,000, measured 900 output tok/s" in found.measured
    assert prediction_claim([], "--quick").verdict == "n/a"
