import pytest

from common import targets
from common.gpu import Machine
from common.models import SHAPES, Model

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 16, (9, 0), True, True)
ROW = {"tpot_p50_ms": 49.9, "tpot_p99_ms": 99.9, "utilization": 85.0}


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ({}, ["holds", "holds", "holds"]),
        ({"tpot_p50_ms": 50.0}, ["fails", "holds", "holds"]),
        ({"tpot_p99_ms": 100.0}, ["holds", "fails", "holds"]),
        ({"utilization": 95.1}, ["holds", "holds", "fails"]),
        ({"utilization": 0.0}, ["holds", "holds", "fails"]),  # sampled, and idle
        ({"utilization": None}, ["holds", "holds", "n/a"]),
    ],
)
def test_latency_and_utilization(change, verdicts):
    found = targets.judged(ROW | change)
    assert [v.claim for v in found] == ["S2", "S3", "S4"] and [v.verdict for v in found] == verdicts


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("deepseek-coder-33b", ""),
        ("llama-3-8b", "this is llama-3-8b"),
        ("mixtral-8x7b", "this is mixtral-8x7b, of which a token uses 13B parameters"),  # of 47B
        ("qwen3-30b-a3b", "this is qwen3-30b-a3b, of which a token uses 3B parameters"),
    ],
)
def test_the_claims_are_about_what_a_token_uses(shape, reason):
    found = targets.why_not_judged(Model("p", shape, SHAPES[shape]), H100)
    assert found.endswith(reason) and bool(found) == bool(reason)


def test_a_model_of_unknown_size_decides_nothing():
    assert "of unknown size" in targets.why_not_judged(Model("p", "new", {"model_type": "new"}), H100)
