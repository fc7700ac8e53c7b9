"""Rows of the tables."""

import pytest

from ch16.parts.speculative_decoding.tables import gamma_rows, theory_row
from ch16.parts.speculative_decoding.theory import Counts, speedup


def test_the_best_gamma_is_marked():
    rows = gamma_rows({1: 1.2, 4: 2.5, 8: 2.0}, Counts(10, 10, 35, 8), {1: 1.0, 2: 9.0, 4: 1.1, 8: 1.2})
    assert [row["best"] for row in rows] == ["", "<- best measured", "<- best predicted"]
    none = gamma_rows({1: 1.0, 4: 0.9}, Counts(10, 0, 0, 0), {1: 1.0, 4: 1.1})
    assert [row["best"] for row in none] == ["<- best measured", ""] and "predicted" not in none[0]


def test_a_row_compares():
    row = theory_row("vLLM", "copying", 4, Counts(10, 5, 12, 2), 1.2, None, 1.6, 1.1)
    assert row["alpha"] == 12 / 15 and row["share_percent"] == 50
    assert row["predicted"] == pytest.approx(speedup(0.8, 4, 1.2, 0, 0.5, 1.1)) == pytest.approx(1.6 / row["ratio"])


def test_nothing_is_predicted_where_nothing_was_drafted():
    counts = Counts(10, 0, 0, 0)
    row = theory_row("vLLM", "free", 4, counts, None, None, 0.99)
    assert "predicted" not in row and row["speedup"] == 0.99
