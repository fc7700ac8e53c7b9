"""Claims, settings and errors of the script, and the whole of it on the real engine."""

import argparse
import math
import os
import subprocess
import sys

import pytest

from ch16 import continuous_batching
from ch16.continuous_batching import admission_claim, prepare, sizes_for
from ch16.parts.continuous_batching.interference import CHUNKED, NONE, SEPARATE, WHOLE
from ch16.parts.continuous_batching.separate import cannot_separate
from common.cli import CannotRun
from common.gpu import Machine, detect

CPU = Machine("cpu", "a CPU", 1, 2**40, 2, None, True, False)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 16, (9, 0), True, True)
SCRIPT = continuous_batching.__file__


def rows(fixed_tokens_per_s, wait_s, p99_s):
    both = ((fixed_tokens_per_s, 5.0, 9.0), (100.0, wait_s, p99_s))
    return [{"tokens_per_s": t, "wait_p50_s": w, "e2e_p50_s": 1.0 + w, "e2e_p99_s": p} for t, w, p in both]


@pytest.mark.parametrize(
    ("fixed", "wait", "p99", "verdict"),
    [(50.0, 2.0, 5.0, "holds"), (101.0, 2.0, 5.0, "fails"), (50.0, 2.0, 9.5, "fails"), (50.0, 5.5, 5.0, "fails")],
)
def test_the_claim(fixed, wait, p99, verdict):
    gains = [{"measured": 100 / fixed, "share": share} for share in (0.95, 0.99)]
    found = admission_claim(rows(fixed, wait, p99), gains)
    assert found.verdict == verdict and "target" not in found.measured
    missed = admission_claim(rows(fixed, wait, p99), [gains[0] | {"share": 0.85}, gains[1]])
    assert missed.verdict == verdict
    assert admission_claim(rows(fixed, wait, p99), [gains[0] | {"share": 1.5}, gains[1]]).verdict == "n/a"
    assert "0.85 of the most possible (target 0.9; at these step times 0.99)" in missed.measured


def arguments(**given):
    return argparse.Namespace(**{"dummy_weights": "tiny-llama", "quick": True, "seed": 3} | given)


@pytest.mark.parametrize("machine", [CPU, H100])
@pytest.mark.parametrize("quick", [True, False])
def test_sizes_fit_together(machine, quick):
    sizes = sizes_for(machine, quick)
    traffic = sizes.traffic
    assert sizes.budget >= max(traffic.prompt + traffic.streams, sizes.prefill.batches[-1] * sizes.prefill.tokens)
    assert sizes.context <= sizes.max_model_len and sizes.load.requests % sizes.load.slots == 0
    assert max(traffic.streams, sizes.load.slots) <= sizes.decode.batches[-1] < sizes.budget
    assert traffic.every <= 100  # more than one of a hundred gaps is disturbed: P99 sees it
    assert traffic.prompts >= 3 and traffic.streams < min(traffic.budgets) < max(traffic.budgets) < traffic.prompt


@pytest.fixture
def environment(monkeypatch):
    """What is set in it stays in the test."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return os.environ


def test_settings(environment):
    model, sizes, settings = prepare(arguments(), CPU)
    assert model.dummy and settings["load_format"] == "dummy" and settings["seed"] == 3
    assert settings["max_num_batched_tokens"] == sizes.budget and settings["enable_prefix_caching"] is False
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert settings["max_num_seqs"] == 64 and settings["max_model_len"] == 2048
    assert "compilation_config" not in settings  # a CPU has no CUDA graphs


def test_on_a_gpu_steps_that_read_prompts_are_cuda_graphs_too(environment):
    _, _, settings = prepare(arguments(), H100)
    assert settings["compilation_config"] == {"cudagraph_mode": "FULL"} and settings["enforce_eager"] is False


def test_a_short_context_is_refused(environment, tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 256, "vocab_size": 512}')
    with pytest.raises(CannotRun, match=r"has a context of 256 tokens, \d+ are needed"):
        prepare(arguments(dummy_weights=str(tmp_path)), CPU)


def test_an_engine_elsewhere_is_refused(environment):
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with pytest.raises(CannotRun, match="unset VLLM_ENABLE_V1_MULTIPROCESSING"):
        prepare(arguments(), CPU)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--dummy-weights", "nope"], 1, "no shape 'nope'"),
        (["--model", "no/such/model"], 1, "no model"),
        (["--plot", "x.pdf"], 2, "must end in .png"),
        (["--device", "cuda"], 1, "no GPU found"),
        (["--slots", "0"], 2, "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_before_anything_slow(flags, status, message):
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].count("error: ") == 1 and "starting" not in done.stderr


@pytest.mark.slow
def test_the_script(quick_run):
    """On the real engine: what holds on any machine, by counting or by far."""
    done = quick_run("python3", "ch16/continuous_batching.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = {name: table["rows"] for name, table in done.json["tables"].items()}
    fixed, free = tables["admission"]
    assert fixed["running"] < 3 < free["running"] <= 4  # of 4 slots
    assert tables["gain"][0]["at_most"] > 1.5 and free["tokens_per_s"] > fixed["tokens_per_s"]
    assert all(any(row["mark"] for row in tables[phase]) for phase in ("decode", "prefill"))
    assert tables["decode"][-1]["tokens_per_s"] > tables["decode"][0]["tokens_per_s"]

    rows = {(row["how"], row["budget"]): row for row in tables["interference"]}
    traffic = done.json["settings"]["traffic"]
    chunks = {(WHOLE, None): 1} | {
        (CHUNKED, b): math.ceil(traffic["prompt"] / (b - traffic["streams"])) for b in traffic["budgets"]
    }
    for way, count in chunks.items():  # so the engine kept each budget
        assert rows[way]["steps"] == count
    assert rows[NONE, None]["itl_p99_ms"] < rows[WHOLE, None]["itl_p99_ms"]
    assert ((SEPARATE, None) in rows) == (cannot_separate(detect()) == "")
    assert [claim["claim"] for claim in done.json["claims"]] == ["B1", "B2", "B3", "B4"]
    assert done.plot.stat().st_size > 10_000
