"""Rows of the tables, from made-up timelines and runs; verdicts on B1 to B4 from made-up rows."""

import math

import pytest

from ch16.parts.continuous_batching.interference import SEPARATE, WHOLE, PrefillMode
from ch16.parts.continuous_batching.tables import (
    admission_claim,
    admission_row,
    best_chunked,
    fit_rows,
    gain_rows,
    interference_claim,
    interference_rows,
    knee_row,
    size_claim,
)
from ch16.parts.continuous_batching.workload import AdmissionLoad
from tests.ch16.parts.continuous_batching.made_up import BATCHES, disturbed_rows, size_rows, stream_runs
from tests.timelines import timeline


def test_a_row():
    run = timeline(
        sent={"a": 10.0, "b": 12.0},
        arrived={"a": [11.0, 12.0], "b": [13.0, 14.0, 20.0]},
        steps=[(11.0, 1), (12.0, 1), (13.0, 1), (14.0, 1), (20.0, 1)],
    )
    row = admission_row("fixed", run)
    assert row["tokens_per_s"] == 0.5 and row["running"] == 1.0
    assert row["wait_p50_s"] == 1.0 and row["e2e_p50_s"] == 6.0 and row["e2e_p99_s"] == pytest.approx(9.92)


def test_gain_and_fit_rows():
    rows = gain_rows(1.2, [1, 9, 3, 3], 2, {1: 1.0, 2: 1.0})
    assert [row["at_most"] for row in rows] == [1.5, 1.5] and rows[0]["share"] == pytest.approx(0.8)
    reserved, paged = fit_rows(AdmissionLoad(2, 4, 8, 4, 1), [8, 9, 24, 25], blocks=100, block_size=16, longest=100)
    assert (reserved["blocks"], reserved["fit"]) == (math.ceil(100 / 16), 14)
    assert (paged["blocks"], paged["fit"]) == ((1 + 2 + 2 + 3) / 4, 50)


def test_a_knee_beside_its_crossover():
    row = knee_row("decode", size_rows(64, 1), (math.inf, "never"))
    assert row["crossover"] is None and row["knee"] == "64" and row["chapter"] == "32 to 128"
    assert knee_row("decode", size_rows(64, 1), (294.3, ""))["crossover"] == 295


def test_rows():
    rows = disturbed_rows(30, 20, chunked_s=2.0)
    assert [row["p99_ratio"] for row in rows] == pytest.approx([0.1, 1, 0.3, 0.6, 0.15, 0.2])
    assert [row.get("throughput_ratio") for row in rows] == [None, 1, 0.5, 1, None, 1]
    assert "steps" not in rows[-1] and rows[1]["steps"] == 2 and rows[1]["ttft_ms"] == 500
    assert rows[1]["itl_p50_ms"] == pytest.approx(10) and rows[1]["itl_max_ms"] == pytest.approx(100)


def test_rows_are_medians_of_rounds():
    noisy = {PrefillMode(WHOLE, "2 cores"): [*stream_runs(100), *stream_runs(300), *stream_runs(110)]}
    (row,) = interference_rows(noisy)
    assert row["itl_p99_ms"] == pytest.approx(110) and row["itl_max_ms"] == pytest.approx(110)


# ---- claims ----


def admission_rows(fixed_tokens_per_s, wait_s, p99_s):
    policies = ((fixed_tokens_per_s, 5.0, 9.0), (100.0, wait_s, p99_s))
    return [{"tokens_per_s": t, "wait_p50_s": w, "e2e_p50_s": 1.0 + w, "e2e_p99_s": p} for t, w, p in policies]


@pytest.mark.parametrize(
    ("fixed", "wait", "p99", "verdict"),
    [(50.0, 2.0, 5.0, "holds"), (101.0, 2.0, 5.0, "fails"), (50.0, 2.0, 9.5, "fails"), (50.0, 5.5, 5.0, "fails")],
)
def test_the_claim_on_admission(fixed, wait, p99, verdict):
    gains = [{"measured": 100 / fixed, "share": share} for share in (0.95, 0.99)]
    found = admission_claim(admission_rows(fixed, wait, p99), gains)
    assert found.verdict == verdict and "target" not in found.measured
    missed = admission_claim(admission_rows(fixed, wait, p99), [gains[0] | {"share": 0.85}, gains[1]])
    assert missed.verdict == verdict
    assert admission_claim(admission_rows(fixed, wait, p99), [gains[0] | {"share": 1.5}, gains[1]]).verdict == "n/a"
    assert "0.85 of the most possible (target 0.9; at these step times 0.99)" in missed.measured


@pytest.mark.parametrize(
    ("phase", "base", "part", "verdict"),
    [
        ("decode", 64, 1, "holds"),
        ("decode", 24, 1, "holds"),  # 16 to 32
        ("decode", 8, 1, "fails"),
        ("decode", 1000, 1, "fails"),  # at 256, beyond the chapter's
        ("prefill", 0, 1, "holds"),
        ("prefill", 32, 1, "fails"),
    ],
)
def test_the_claims_on_sizes(phase, base, part, verdict):
    found = size_claim(phase, size_rows(base, part))
    assert found.verdict == verdict and found.measured.startswith("knee at ")


def test_a_knee_at_the_end_of_what_was_measured_may_be_beyond():
    found = size_claim("decode", size_rows(1000, 1, BATCHES[:5]))
    assert found.verdict == "n/a" and "16 was the largest" in found.reason
    assert size_claim("decode", size_rows(1000, 1, BATCHES[:6])).verdict == "holds"  # 32 is the chapter's
    assert size_claim("prefill", size_rows(1000, 1, BATCHES[:6])).verdict == "fails"  # beyond 8 already


def test_the_best_chunk_keeps_the_throughput():
    assert best_chunked(disturbed_rows(30, 20))["budget"] == 64
    assert best_chunked(disturbed_rows(30, 20, chunked_s=2.0))["budget"] == 128
    slow = [row | {"throughput_ratio": 0.5} for row in disturbed_rows(30, 20)]
    assert best_chunked(slow)["budget"] == 64


def test_the_claim_on_interference():
    holds, fails, close = (interference_claim(disturbed_rows(30, separate_ms), "") for separate_ms in (20, 40, 29))
    assert (holds.verdict, fails.verdict, close.verdict) == ("holds", "fails", "n/a") and "10%" in close.reason
    assert holds.measured.startswith("ITL P99 10.0 ms without long prompts, 100.0 with whole ones, 30.0 in chunks (64")
    assert holds.measured.endswith("20.0 on separate engines")
    alone = [row for row in disturbed_rows(30, 20) if row["how"] != SEPARATE]
    undecided = interference_claim(alone, "one GPU")
    assert (undecided.verdict, undecided.reason) == ("n/a", "one GPU") and "separate" not in undecided.measured
