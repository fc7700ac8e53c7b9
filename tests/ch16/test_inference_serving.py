import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16 import inference_serving as serving
from common.cli import CannotRun
from common.gpu import Machine, Peak
from common.models import SHAPES, Model

SCRIPT = str(Path(serving.__file__))
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 << 30, 16, (9, 0), True, True, Peak())
EIGHT = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 16, (9, 0), True, True, Peak())
CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False, Peak())
LARGE = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"], dummy=True)
SMALL = Model("p", "llama-3-8b", SHAPES["llama-3-8b"], dummy=True)


def run(*flags):
    command = [sys.executable, SCRIPT, *flags]  # what is not refused would serve for ever
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)


# ---- the search for the best concurrency ----


def machine_with_knee(knee, calls):
    """TPOT grows with concurrency and breaks its target above the knee; throughput always grows."""

    def wave(n):
        calls.append(n)
        tpot = 10.0 if n <= knee else 60.0
        return {"concurrency": n, "tokens_per_s": float(n), "tpot_p50_ms": tpot, "tpot_p99_ms": tpot}

    return wave


@given(st.integers(0, 600), st.integers(1, 64), st.integers(1, 600))
def test_search_finds_the_knee(knee, first, limit):
    calls = []
    rows = serving.search_concurrency(machine_with_knee(knee, calls), first, limit, bisections=10)
    assert len(calls) == len(set(calls)) == len(rows) <= 21 and max(calls) <= limit
    best = serving.best_row(rows)
    if min(first, limit) <= knee:
        # The bisection stops at a gap of a tenth.
        assert best["concurrency"] <= min(knee, limit) <= max(best["concurrency"] * 1.12, best["concurrency"] + 2)
    elif serving.meets_targets(best):
        assert best["concurrency"] <= knee


def test_if_nothing_meets_the_targets_the_least_bad_is_shown():
    rows = serving.search_concurrency(machine_with_knee(0, []), 4, 64)
    assert not serving.meets_targets(serving.best_row(rows))


# ---- the claims ----


def best(tokens_per_s=5000.0, p50=40.0, p99=60.0, busy=90.0, gpus=1):
    return {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_gpu": tokens_per_s / gpus,
        "tpot_p50_ms": p50,
        "tpot_p99_ms": p99,
        "utilization": busy,
    }


def verdicts(*args):
    return {v.claim: v.verdict for v in serving.claims(*args)}


def test_claims_on_a_cpu_are_never_decided():
    assert set(verdicts(best(), SMALL, CPU, 1).values()) == {"n/a"}
    assert all(v.reason for v in serving.claims(best(), SMALL, CPU, 1))


@pytest.mark.parametrize("shape", ["llama-3-8b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_claims_of_a_model_that_computes_less_are_never_decided(shape):
    """Of a mixture of experts what a token uses is counted: 3B of the 30B, 13B of the 47B."""
    found = serving.claims(best(20_000.0), Model("p", shape, SHAPES[shape]), EIGHT, 8)
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


# ---- the command line ----


@pytest.mark.parametrize(
    "flags",
    [
        ("--nonsense",),
        ("--demo", "--serve"),
        ("--tensor-parallel", "0"),
        ("--serve", "--json", "x"),
        ("--compare-bf16", "--quantization", "fp8"),
        ("--device", "tpu"),
        ("--serve", "--max-queue", "-1"),
        ("--serve", "--quick"),
        ("--seed", "-1"),
        ("--serve", "--drain-timeout", "nan"),
        ("--serve", "--drain-timeout", "-1"),
    ],
)
def test_usage_errors_exit_with_2(flags):
    done = run(*flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "cuda"), "no GPU found"),
        (("--model", "no/such/folder"), "no model 'no/such/folder'"),
        (("--model", "/tmp"), "it has no config.json"),
        (("--dummy-weights", "gpt-99"), "no shape 'gpt-99'"),
        (("--device", "cpu", "--quantization", "fp8"), "has no FP8 units"),
        (("--device", "cpu", "--tensor-parallel", "2"), "9 attention heads do not divide"),
        (("--device", "cpu", "--compare-bf16"), "newer GPUs do); leave --compare-bf16 out"),
        (("--serve", "--device", "cpu", "--port", "70000"), "cannot listen on 127.0.0.1:70000"),
    ],
)
def test_failures_are_one_line_and_exit_with_1(flags, message):
    if flags == ("--device", "cuda") and serving.detect().device == "cuda":
        pytest.skip("this machine has a GPU")
    done = run(*flags)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_a_checkpoint_that_is_quantized_already_cannot_be_compared():
    awq = Model("p", "awq-model", SHAPES["llama-3-8b"] | {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(CannotRun, match="awq-model is quantized already"):
        serving.require_two_precisions(awq, H100)
    serving.require_two_precisions(SMALL, H100)


def test_help_shows_every_flag_and_its_default():
    done = run("--help")
    assert done.returncode == 0
    for text in ("--quick", "--dummy-weights", "--drain-timeout", "(default: 8000)"):
        assert text in done.stdout


# ---- the demo, for real ----


@pytest.mark.slow
def test_the_json_holds_what_was_printed(quick_run):
    """Two ranks of the engine: see tests/ch16/parts/serving_layouts/test_launch.py."""
    done = quick_run("python3", "ch16/inference_serving.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    rows = done.json["tables"]["load"]["rows"]
    assert rows and all(f"{row['tokens_per_s']:,.0f}" in done.out for row in rows)
    assert [row["best"] for row in rows].count("") == len(rows) - 1  # one is marked
    assert [claim["claim"] for claim in done.json["claims"]] == ["S1", "S2", "S3", "S4"]
    assert done.json["script"] == "inference_serving.py" and done.json["settings"]["dummy_weights"] is False
    assert all(f"Prompt: {prompt}\nGenerated: " in done.out for prompt in serving.PROMPTS)
    assert done.plot.read_bytes().startswith(b"\x89PNG")
