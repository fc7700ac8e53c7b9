import pytest

from ch16.inference_profiling import NEAR_PERCENT, verdict
from ch16.parts.inference_profiling.attribution import KINDS
from ch16.parts.inference_profiling.tables import (
    KIND_KEYS,
    ProfiledRun,
    bounds_rows,
    claim,
    cost_row,
    gap_share,
    kinds_row,
    modes_row,
    work_of_phases,
)
from ch16.parts.inference_profiling.work import Limits, Weights
from common.models import SHAPES


def test_kinds_are_shares():
    row = kinds_row("decode", dict(zip(KINDS, (1, 0, 0.5, 0, 0.5), strict=True)), wall=2.5)
    assert [row[key] for key in KIND_KEYS] == [50, 0, 25, 0, 25]
    assert row["ms"] == 2000 and row["sum_percent"] == 80


def test_gaps_are_those_without_the_profiler():
    """A GPU that worked one of two profiled seconds idles a fifth of 1.25; a CPU's share is that of the profile."""
    parts = dict(zip(KINDS, (1, 0, 0, 0, 1), strict=True))
    assert gap_share(parts, 1.25, "cuda") == pytest.approx(0.2) and gap_share(parts, 1.25, "cpu") == 0.5
    assert gap_share(parts, 0.9, "cuda") == 0


def test_bounds():
    run, weights, config = ProfiledRun(2, 100, 10), Weights(1_000_000, 0), SHAPES["tiny-llama"]
    work = work_of_phases(weights, config, run, prompt_logits=100)
    parts = {name: dict(zip(KINDS, (1, 0, 0, 0, 0.2), strict=True)) for name in work}
    limits = Limits(1e9, 1e8, "made up")
    prefill, decode = bounds_rows(run, parts, {"prefill": 1.0, "decode": 0.5}, work, "cpu", limits, verdict)
    assert (prefill["tokens"], decode["tokens"]) == (200, 20) and decode["tokens_per_s"] == 40
    assert prefill["compute_percent"] == pytest.approx(100 * work["prefill"].flops / 1e9)
    assert decode["memory_percent"] == pytest.approx(100 * work["decode"].bytes / 0.5 / 1e8)
    assert (prefill["verdict"], decode["verdict"]) == ("compute-bound", "memory-bound")
    assert work["decode"].bytes > 10 * 2e6, "weights are read in every step"


def test_cost_is_relative_to_no_profiler():
    row = cost_row("x", {"prefill": 2.0, "decode": 3.0}, {"prefill": 1.0, "decode": 2.0})
    assert (row["prefill_ratio"], row["decode_ratio"], row["decode_ms"]) == (2.0, 1.5, 3000.0)


def test_a_launch_mode_is_judged_per_step():
    row = modes_row({"what": "x", "ms": 200.0, "idle_percent": 25.0, "verdict": "v"}, 10, 2.0, 0.015, 9, 3.0)
    assert (row["step_ms"], row["busy_ms"], row["over_eager"], row["error_percent"]) == (20.0, 15.0, 2.0, 1.5)
    assert (row["what"], row["verdict"], row["same"], row["prepare_s"]) == ("x", "v", 9, 3.0)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ("compute-bound", "memory-bound", "holds"),
        ("compute-bound", "launch-bound", "holds"),
        ("memory-bound", "memory-bound", "fails"),
        ("compute-bound", "compute-bound", "fails"),
    ],
)
def test_the_claim(prefill, decode, expected):
    shares = {"compute_percent": 50.0, "memory_percent": 9.0, "idle_percent": 3.0}
    rows = [{"what": "prefill", "verdict": prefill, **shares}, {"what": "decode", "verdict": decode, **shares}]
    found = claim(rows, NEAR_PERCENT)
    tiny = [row | {"compute_percent": 4.0, "memory_percent": 1.0} for row in rows]
    assert claim(tiny, NEAR_PERCENT).verdict == ("n/a" if "launch" not in prefill else expected)
    assert found.verdict == expected and f"decode is {decode}: 50% of the compute limit" in found.measured
