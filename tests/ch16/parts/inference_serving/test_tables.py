import pytest

from ch16.inference_serving import CHAPTER
from ch16.parts.inference_serving.tables import claims, differences
from common.gpu import Machine, Peak
from common.models import SHAPES, Model

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 << 30, 16, (9, 0), True, True, Peak())
EIGHT = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 16, (9, 0), True, True, Peak())
CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False, Peak())
LARGE = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"], dummy=True)
SMALL = Model("p", "llama-3-8b", SHAPES["llama-3-8b"], dummy=True)


def test_the_exceptions_are_named():
    assert differences({"model": "p"} | CHAPTER, CHAPTER) == "engine:  the chapter's settings"
    there = {"a": 1, "b": True, "q": "fp8"}
    found = differences({"model": "p", "a": 1, "b": False, "new": 7}, there)
    assert found == "engine:  the chapter's settings, except b=False, q=None, new=7"


def best(tokens_per_s=5000.0, p50=40.0, p99=60.0, busy=90.0, gpus=1):
    return {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_gpu": tokens_per_s / gpus,
        "tpot_p50_ms": p50,
        "tpot_p99_ms": p99,
        "utilization": busy,
    }


def verdicts(*args):
    return {v.claim: v.verdict for v in claims(*args)}


def test_claims_on_a_cpu_are_never_decided():
    assert set(verdicts(best(), SMALL, CPU, 1).values()) == {"n/a"}
    assert all(v.reason for v in claims(best(), SMALL, CPU, 1))


@pytest.mark.parametrize("shape", ["llama-3-8b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_claims_of_a_model_that_computes_less_are_never_decided(shape):
    """Of a mixture of experts what a token uses is counted: 3B of the 30B, 13B of the 47B."""
    found = claims(best(20_000.0), Model("p", shape, SHAPES[shape]), EIGHT, 8)
    assert {v.verdict for v in found} == {"n/a"} and all(f"this is {shape}" in v.reason for v in found)


@pytest.mark.parametrize(
    ("row", "machine", "expected"),
    [
        (best(), H100, {"S1": "n/a", "S2": "holds", "S3": "holds", "S4": "holds"}),
        (best(16000.0, gpus=8), EIGHT, {"S1": "holds", "S2": "holds", "S3": "holds", "S4": "holds"}),
        (best(14999.0, 50.0, 100.0, 99.0, 8), EIGHT, dict.fromkeys(("S1", "S2", "S3", "S4"), "fails")),
        (best(busy=None), H100, {"S1": "n/a", "S2": "holds", "S3": "holds", "S4": "n/a"}),
        (best(busy=0.0), H100, {"S1": "n/a", "S2": "holds", "S3": "holds", "S4": "fails"}),
    ],
)
def test_claims_of_the_33b_model(row, machine, expected):
    assert verdicts(row, LARGE, machine, machine.count) == expected


def test_four_of_eight_gpus_do_not_decide_s1():
    assert verdicts(best(16000.0, gpus=4), LARGE, EIGHT, 4)["S1"] == "n/a"
