import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16 import inference_serving as serving
from common import targets
from common.engine import engine_args
from common.gpu import Machine, Peak
from common.models import SHAPES, Model

SCRIPT = str(Path(serving.__file__))
EIGHT = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 16, (9, 0), True, True, Peak())
CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False, Peak())
LARGE = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"], dummy=True)
TINY = Model("p", "tiny-llama", SHAPES["tiny-llama"], dummy=True)


def run(*flags):
    command = [sys.executable, SCRIPT, *flags]  # what is not refused would serve for ever
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)


# ---- the chapter's settings, and the machine's exceptions ----


def settings(model, machine):
    asked = argparse.Namespace(tensor_parallel=None, max_num_seqs=None)
    return serving.settings_for(model, machine, asked, "auto")


def test_eight_gpus_with_fp8_run_the_chapters_call():
    checkpoint = replace(LARGE, dummy=False)
    assert settings(checkpoint, EIGHT) == serving.CHAPTER | {"model": "p"}


@pytest.mark.parametrize(("model", "machine"), [(LARGE, EIGHT), (TINY, CPU), (TINY, replace(CPU, native_bf16=False))])
def test_the_settings_are_those_of_the_other_scripts(model, machine):
    assert settings(model, machine) == {"dtype": "auto"} | engine_args(model, machine)


def test_a_changed_setting_is_used(monkeypatch):
    monkeypatch.setitem(serving.CHAPTER, "tensor_parallel_size", 4)
    monkeypatch.setitem(serving.CHAPTER, "max_model_len", 512)
    found = settings(LARGE, EIGHT)
    assert (found["tensor_parallel_size"], found["max_model_len"]) == (4, 512)


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
    best = targets.best_row(rows, serving.meets_targets)
    if min(first, limit) <= knee:
        # The bisection stops at a gap of a tenth.
        assert best["concurrency"] <= min(knee, limit) <= max(best["concurrency"] * 1.12, best["concurrency"] + 2)
    elif serving.meets_targets(best):
        assert best["concurrency"] <= knee


def test_if_nothing_meets_the_targets_the_least_bad_is_shown():
    rows = serving.search_concurrency(machine_with_knee(0, []), 4, 64)
    assert not serving.meets_targets(targets.best_row(rows, serving.meets_targets))


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


def test_help_shows_every_flag_and_its_default():
    done = run("--help")
    assert done.returncode == 0
    for text in ("--quick", "--dummy-weights", "--drain-timeout", "(default: 8000)"):
        assert text in done.stdout


# ---- the demo, for real ----


@pytest.mark.slow
def test_the_json_holds_what_was_printed(quick_run):
    """Two ranks of the engine: see tests/ch16/test_serving_layouts.py."""
    done = quick_run("python3", "ch16/inference_serving.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    rows = done.json["tables"]["load"]["rows"]
    assert rows and all(f"{row['tokens_per_s']:,.0f}" in done.out for row in rows)
    assert [row["best"] for row in rows].count("") == len(rows) - 1  # one is marked
    assert [claim["claim"] for claim in done.json["claims"]] == ["S1", "S2", "S3", "S4"]
    assert done.json["script"] == "inference_serving.py" and done.json["settings"]["dummy_weights"] is False
    assert all(f"Prompt: {prompt}\nGenerated: " in done.out for prompt in serving.PROMPTS)
    assert done.plot.read_bytes().startswith(b"\x89PNG")
