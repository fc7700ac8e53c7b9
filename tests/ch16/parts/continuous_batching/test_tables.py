"""Rows of the tables, from made-up timelines and runs."""

import math

import pytest

from ch16.parts.continuous_batching.interference import WHOLE, PrefillMode
from ch16.parts.continuous_batching.sizes import AdmissionLoad
from ch16.parts.continuous_batching.tables import admission_row, fit_rows, gain_rows, interference_rows, knee_row
from tests.ch16.parts.continuous_batching.made_up import disturbed_rows, size_rows, stream_runs
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
