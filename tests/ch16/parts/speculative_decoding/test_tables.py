"""Rows of the tables; where speculation is slower, and D1, from made-up rows."""

import pytest

from ch16.parts.speculative_decoding.tables import gamma_rows, slower_where, speculation_claim, theory_row
from ch16.parts.speculative_decoding.theory import Counts, speedup


def test_the_best_gamma_is_marked():
    rows = gamma_rows({1: 1.2, 4: 2.5, 8: 2.0}, Counts(10, 10, 35, 8), {1: 1.0, 2: 9.0, 4: 1.1, 8: 1.2})
    assert [row["best"] for row in rows] == ["", "<- best measured", "<- best predicted"]
    none = gamma_rows({1: 1.0, 4: 0.9}, Counts(10, 0, 0, 0), {1: 1.0, 4: 1.1})
    assert [row["best"] for row in none] == ["<- best measured", ""] and "predicted" not in none[0]


def test_a_row_compares():
    row = theory_row(Counts(10, 5, 12, 2), 4, 1.2, 1.6, idle_cost=1.1)
    assert row["alpha"] == 12 / 15 and row["share_percent"] == 50
    assert row["predicted"] == pytest.approx(speedup(0.8, 4, 1.2, 0, 0.5, 1.1)) == pytest.approx(1.6 / row["ratio"])


def test_nothing_is_predicted_where_nothing_was_drafted():
    row = theory_row(Counts(10, 0, 0, 0), 4, verify_cost=None, measured=0.99)
    assert "predicted" not in row and row["speedup"] == 0.99


# ---- the claim ----


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 2.0, 8: 0.9, 64: 0.8}, "from 8 requests at once"),
        ({1: 0.9, 8: 0.9, 64: 0.8}, "at every batch"),
        ({1: 2.0, 8: 0.9, 64: 1.1}, "at 8, not beyond"),
        ({1: 2.0, 8: 1.0, 64: 1.1}, "nowhere up to 64"),
        ({1: 2.0, 2: 1.5, 4: 1.1}, "nowhere up to 4"),
        ({1: 2.0, 2: 1.0, 4: 0.9, 8: 0.8}, "from 4 requests at once"),
        ({1: 0.9, 2: 0.8}, "at every batch"),
        # In any order; a small batch that was slower by chance does not count.
        ({8: 0.7, 1: 0.99, 2: 1.2, 4: 0.9}, "from 4 requests at once"),
    ],
)
def test_where_it_is_slower_is_said(speedups, expected):
    assert slower_where([{"batch": batch, "speedup": ratio} for batch, ratio in speedups.items()]) == expected


def rows_of(copying, free, how="n-gram"):
    ratios = {"copying": (copying, 0.9), "free": (free, 0.8)}
    return [
        {"how": how, "text": text, "batch": batch, "speedup": ratio, "same": "3 of 4", "gap": 0.02}
        for text, of_text in ratios.items()
        for batch, ratio in zip((1, 8), of_text, strict=True)
    ]


@pytest.mark.parametrize(
    ("copying", "free", "verdict"), [(1.31, 0.9, "holds"), (1.29, 2.0, "fails"), (3.0, 0.5, "holds")]
)
def test_the_claim_is_judged_on_copying_text(copying, free, verdict):
    rows = rows_of(copying, free) + rows_of(9.0, 9.0, how="EAGLE")
    found = speculation_claim(rows, [{"how": "vLLM, n-gram", "text": "copying", "ratio": 1.02}], target=1.3)
    assert found.verdict == verdict and f"{copying:.2f} times" in found.measured and f"{free:.2f} on" in found.measured
    slower = "copying from 8 requests at once, free " + ("at every batch" if free < 1 else "from 8")
    assert "3 of 4, the others part between tokens 0.02 apart" in found.measured
    assert "predicted 1.02" in found.measured and slower in found.measured


def test_nothing_accepted_is_no_crash():
    theory = [{"how": "vLLM, n-gram", "text": "copying"}]
    assert "measured over predicted n/a" in speculation_claim(rows_of(1.0, 1.0), theory, 1.3).measured
