import pytest

from ch16.parts.autoscaling.search import Tried
from ch16.parts.autoscaling.signals import signals
from ch16.parts.autoscaling.tables import claim, price_rows

FRONTIER = [Tried(0.9, 90.0, 10.0), Tried(0.5, 0.0, 40.0)]  # taking turns: 30% for 30 hours


def test_budgets_buy_fewer_misses():
    (row,) = price_rows({"gpu": FRONTIER}, signals(8), full_h=6.0)
    assert row["b1.5"] is None and row["b2"] == row["b3.5"] == 90.0
    (row,) = price_rows({"gpu": FRONTIER}, signals(8), full_h=10.0)
    assert row["b1.5"] == 90.0 and row["b4"] == 0.0


def row(name, missed, hours):
    return {"signal": name, "missed_percent": missed, "hours": hours}


@pytest.mark.parametrize(("missed", "verdict"), [(5.9, "holds"), (6.1, "fails")])
def test_the_claim_is_judged_at_the_same_price(missed, verdict):
    rows = {"queue": row("queue depth", 50.0, 20.0), "active": row("active", missed, 30.0), "gpu": row("gpu", 90.0, 10)}
    found = claim(rows, FRONTIER)
    assert found.verdict == verdict
    assert "30.00% for as many replica-hours" in found.measured and "Queue depth alone: 50.00%" in found.measured


def test_nothing_to_win_is_no_win():
    rows = {"active": row("active", 0.0, 40.0), "gpu": row("gpu", 0.0, 40.0)}
    assert claim(rows, FRONTIER).verdict == "fails"


@pytest.mark.parametrize("names", [["active"], ["gpu", "kv"]])
def test_without_both_sides_there_is_no_verdict(names):
    assert claim({name: row(name, 1.0, 1.0) for name in names}, []).verdict == "n/a"
