import pytest

from ch16.fp8_quant import TARGETS
from ch16.parts.fp8_quant.tables import claims


def reading(ratio, lost, tokens=100):
    return {"recipe": "row", "tokens": tokens, "perplexity_ratio": ratio, "top1_lost_percent": lost}


@pytest.mark.parametrize(
    ("ratio", "speedups", "last", "verdicts"),
    [
        (0.5, (2.1, 2.0), reading(1.009, 0.5), ["holds", "holds", "holds"]),
        (0.53, (2.1, 1.9), reading(1.011, 0.5), ["fails", "fails", "fails"]),
        (0.52, (), reading(1.0, 1.0), ["holds", "n/a", "fails"]),
    ],
)
def test_verdicts(ratio, speedups, last, verdicts):
    phases = ("prefill", "decode, CUDA graph")
    speed = [{"phase": p, "speedup": s, "recipe": "x"} for p, s in zip(phases, speedups, strict=False)]
    found = claims([{"weight_ratio": ratio}], speed, [{}, reading(9, 9), last], TARGETS)
    assert [v.verdict for v in found] == verdicts and [v.claim for v in found] == ["F1", "F2", "F3"]
    assert found[1].reason == ("" if speedups else "no FP8 units here: an emulated product is slower than BF16")
