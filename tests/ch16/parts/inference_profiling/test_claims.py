import pytest

from ch16.inference_profiling import NEAR_PERCENT
from ch16.parts.inference_profiling.claims import claim


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
