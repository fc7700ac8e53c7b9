"""The chapter's function on a small model, the tables, the claim, the command line, and the script on both engines."""

import json
import subprocess
import sys

import pytest
import torch

from ch16 import inference_profiling
from ch16.inference_profiling import Profile, claim, cost_row, cost_rows, profile_inference, prompts
from ch16.parts.inference_profiling.attribution import GAPS, KINDS, time_by_kind
from ch16.parts.inference_profiling.tables import KIND_KEYS, Load, bounds_rows, gap_share, kinds_row, work_of_phases
from ch16.parts.inference_profiling.trace import Event, Trace, read_trace
from ch16.parts.inference_profiling.work import Limits, Weights
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.models import SHAPES
from common.text import load_model

SCRIPT = inference_profiling.__file__


@pytest.fixture(scope="module")
def network():
    return load_model(models.dummy("tiny-llama"), "cpu")[0]


# ---- the chapter's function ----


def test_profile_inference(network, tmp_path, capsys):
    file = tmp_path / "new" / "trace.json"
    profiled = profile_inference(network, torch.ones(2, 20, dtype=torch.long), str(file))
    out = capsys.readouterr().out
    assert "Top 10 operations by device time" in out and "aten::mm" in out and f"written: {file}" in out
    assert read_trace(file) == profiled.trace and set(profiled.spans) == set(profiled.seconds) == {"prefill", "decode"}
    events = json.loads(file.read_text())["traceEvents"]
    assert any(event.get("args", {}).get("Input Dims") for event in events), "shapes are recorded"
    assert any(event["ph"] == "C" for event in events), "memory is a track"
    assert not any(event.get("cat") == "python_function" for event in events), "stacks only where asked"
    parts = {name: time_by_kind(profiled.trace, span) for name, span in profiled.spans.items()}
    for name, times in parts.items():
        assert set(times) == set(KINDS) and min(times.values()) >= 0
        assert sum(times.values()) == pytest.approx(profiled.spans[name].seconds)
    assert parts["prefill"]["matrix products"] > 0 and parts["decode"]["attention"] > 0


def test_stacks_where_asked(network, tmp_path):
    profile_inference(network, torch.ones(1, 4, dtype=torch.long), str(tmp_path / "t.json"), stacks=True)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "python_function" for event in events)


def test_a_trace_that_cannot_be_written(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotRun, match="cannot write the trace"):
        profile_inference(network, torch.ones(1, 4, dtype=torch.long), str(tmp_path / "file" / "t.json"))


def profile_of(seconds, kernels=()):
    span = Event("decode", 10.0, 12.0, 1)
    return Profile(Trace([], list(kernels), [span], [], {}), {"decode": span}, {"decode": seconds})


def test_parts_that_do_not_sum_to_the_wall_time():
    assert profile_of(2.03).parts()["decode"][GAPS] == 2.0
    for seconds in (2.1, 1.9):
        with pytest.raises(CannotRun, match="the parts of decode sum to"):
            profile_of(seconds).parts()


def test_work_of_the_device_outside_the_phases():
    """A kernel before the first phase is warm-up; one after the last belongs to it and was not waited for."""
    inside, before, after = Event("nvjet", 10.5, 11.5), Event("nvjet", 8, 9), Event("nvjet", 12, 12.5)
    assert profile_of(2.0, [before, inside]).parts()["decode"]["matrix products"] == 1.0
    with pytest.raises(CannotRun, match=r"the device worked 1\.5000 s, but only 1\.0000 s are in the phases"):
        profile_of(2.0, [inside, after]).parts()


def test_prompts_are_text_or_random():
    model = models.bundled()
    ids = prompts(model, load_model(model, "cpu")[1], Load(3, 12, 10))
    assert ids.shape == (3, 12) and torch.equal(ids[0], ids[2])
    assert prompts(models.dummy("tiny-llama"), None, Load(2, 9, 10)).shape == (2, 9)


# ---- tables ----


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
    load, weights, config = Load(2, 100, 10), Weights(1_000_000, 0), SHAPES["tiny-llama"]
    work = work_of_phases(weights, config, load, prompt_logits=100)
    parts = {name: dict(zip(KINDS, (1, 0, 0, 0, 0.2), strict=True)) for name in work}
    limits = Limits(1e9, 1e8, "made up")
    prefill, decode = bounds_rows(load, parts, {"prefill": 1.0, "decode": 0.5}, work, "cpu", limits)
    assert (prefill["tokens"], decode["tokens"]) == (200, 20) and decode["tokens_per_s"] == 40
    assert prefill["compute_percent"] == pytest.approx(100 * work["prefill"].flops / 1e9)
    assert decode["memory_percent"] == pytest.approx(100 * work["decode"].bytes / 0.5 / 1e8)
    assert (prefill["verdict"], decode["verdict"]) == ("compute-bound", "memory-bound")
    assert work["decode"].bytes > 10 * 2e6, "weights are read in every step"


def test_cost(network):
    rows = cost_rows(network, torch.ones(1, 8, dtype=torch.long), stacks=True, rounds=1)
    assert [row["what"] for row in rows] == ["off", "operations and kernels", "and shapes, memory", "and stacks"]
    assert rows[0]["prefill_ratio"] == rows[0]["decode_ratio"] == 1 and all(row["decode_ms"] > 0 for row in rows)
    row = cost_row("x", {"prefill": 2.0, "decode": 3.0}, {"prefill": 1.0, "decode": 2.0})
    assert (row["prefill_ratio"], row["decode_ratio"], row["decode_ms"]) == (2.0, 1.5, 3000.0)


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
    found = claim(rows)
    tiny = [row | {"compute_percent": 4.0, "memory_percent": 1.0} for row in rows]
    assert claim(tiny).verdict == ("n/a" if "launch" not in prefill else expected)
    assert found.verdict == expected and f"decode is {decode}: 50% of the compute limit" in found.measured


# ---- the command line ----


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--batch", "0"], 2, "must be at least 1"),
        (["--engine", "other"], 2, "invalid choice"),
        (["--json", "/dev/null/x.json"], 2, "cannot write to /dev/null/x.json"),
        (["--plot", "x.pdf"], 2, "must end in .png, not x.pdf"),
        (["--trace", "/dev/null/t.json"], 2, "cannot write to /dev/null/t.json"),
        (["--dummy-weights", "tiny-llama", "--prompt-tokens", "2040"], 1, "takes 2048 tokens; 2052 are needed"),
        (["--dummy-weights", "small-moe"], 1, "the work of small-moe cannot be counted"),
    ],
)
def test_bad_input_is_one_line(flags, status, message):
    command = [sys.executable, SCRIPT, "--quick", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status and message in done.stderr
    assert status == 2 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)


def test_a_model_larger_than_the_memory(monkeypatch):
    monkeypatch.setattr(inference_profiling, "free_bytes", lambda machine: 1000)
    report = type("Report", (), {"machine": detect("cpu")})()
    args = (None, models.dummy("tiny-llama"), Load(1, 8, 10), Weights(10_000, 0), None, report)
    with pytest.raises(CannotRun, match=r"tiny-llama needs 0\.0 GB for this load, 0\.0 GB are free"):
        inference_profiling.measure_torch(*args)


def run(tmp_path, *flags):
    files = {"--json": tmp_path / "p.json", "--plot": tmp_path / "p.png", "--trace": tmp_path / "t.json"}
    command = [sys.executable, SCRIPT, *flags, *(str(word) for pair in files.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((tmp_path / "p.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_script(tmp_path):
    """A tiny shape (the README's commands run the real model); the script itself checks that the parts sum."""
    content, _ = run(tmp_path, "--quick", "--stacks", "--dummy-weights", "tiny-llama")
    tables = content["tables"]
    operations = tables["operations"]["rows"]
    assert len(operations) == 10 and "matrix products" in [row["kind"] for row in operations]
    assert sorted(operations, key=lambda row: -row["ms"]) == operations
    prefill, decode = tables["bounds"]["rows"]
    assert prefill["verdict"].endswith("-bound") and decode["verdict"].endswith("-bound")
    assert [row["what"] for row in tables["modes"]["rows"]] == ["eager"]
    assert [row["what"] for row in tables["cost"]["rows"]][-1] == "and stacks"
    assert all(sum(row[key] for key in KIND_KEYS) == pytest.approx(100) for row in tables["kinds"]["rows"])


@pytest.mark.slow
def test_the_engine(tmp_path):
    content, out = run(tmp_path, "--quick", "--engine", "vllm", "--dummy-weights", "tiny-llama", "--batch", "2")
    assert [row["what"] for row in content["tables"]["bounds"]["rows"]] == ["prefill", "decode"]
    assert [row["tokens"] for row in content["tables"]["bounds"]["rows"]] == [256, 20]
    assert "engine ready in" in out and "Self CPU" not in out
    assert len(read_trace(tmp_path / "t.json").ranges) > 10
