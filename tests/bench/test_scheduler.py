from tests.bench.scheduler import BARE, BATCH, rows_of


def test_rows_are_medians_within_their_spread():
    rows = rows_of(depth=50, pairs=2 * BATCH, rounds=3)
    assert [row["ratio"] for row in rows if row["what"] == BARE] == [1.0] and len(rows) == 3
    assert all(row["pairs_per_s"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)
