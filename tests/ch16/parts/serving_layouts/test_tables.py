from dataclasses import replace

import pytest

from ch16.parts.serving_layouts.flags import machine_type
from ch16.parts.serving_layouts.tables import claims
from common.models import SHAPES, Model

LARGE = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"], dummy=True)
H100S = machine_type("8x80")
BEST = {"tokens_per_s": 31_000.0, "tpot_p50_ms": 40.0, "tpot_p99_ms": 48.0, "utilization": 90.0}


@pytest.mark.parametrize(
    ("change", "gpus", "model", "verdicts", "reason"),
    [
        ({}, 8, LARGE, ["holds", "holds", "holds", "holds"], ""),
        ({"tokens_per_s": 14_999.0}, 8, LARGE, ["fails", "holds", "holds", "holds"], ""),
        ({"tpot_p50_ms": 50.0, "tpot_p99_ms": 100.0}, 8, LARGE, ["holds", "fails", "fails", "holds"], ""),
        ({"utilization": 99.0}, 8, LARGE, ["holds", "holds", "holds", "fails"], ""),
        ({"utilization": 0.0}, 8, LARGE, ["holds", "holds", "holds", "fails"], ""),
        ({"utilization": None}, 8, LARGE, ["holds", "holds", "holds", "n/a"], "no GPU was sampled"),
        ({}, 4, LARGE, ["n/a"] * 4, "about 8 GPUs, this was measured on 4"),
        ({}, 8, Model("p", "small", SHAPES["llama-3-8b"]), ["n/a"] * 4, "33B model; this is small"),
        ({}, 8, Model("p", "moe", SHAPES["qwen3-30b-a3b"]), ["n/a"] * 4, "of which a token uses 3B parameters"),
        ({}, 8, None, ["n/a"] * 4, "stand-ins"),
    ],
)
def test_claims(change, gpus, model, verdicts, reason):
    found = claims(BEST | change, f"{gpus} x TP=1", gpus, model, H100S)
    assert [v.claim for v in found] == ["S1", "S2", "S3", "S4"] and [v.verdict for v in found] == verdicts
    assert all(reason in v.reason for v in found if v.verdict == "n/a")


def test_claims_on_a_cpu():
    found = claims(BEST | {"utilization": None}, "1 x TP=2", 2, LARGE, replace(H100S, device="cpu"))
    assert {v.verdict for v in found} == {"n/a"} and "this is a CPU" in found[0].reason
