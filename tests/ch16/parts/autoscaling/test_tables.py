from ch16.parts.autoscaling.search import Tried
from ch16.parts.autoscaling.signals import signals
from ch16.parts.autoscaling.tables import price_rows

FRONTIER = [Tried(0.9, 90.0, 10.0), Tried(0.5, 0.0, 40.0)]


def test_budgets_buy_fewer_misses():
    (row,) = price_rows({"gpu": FRONTIER}, signals(8), full_h=6.0)
    assert row["b1.5"] is None and row["b2"] == row["b3.5"] == 90.0
    (row,) = price_rows({"gpu": FRONTIER}, signals(8), full_h=10.0)
    assert row["b1.5"] == 90.0 and row["b4"] == 0.0
