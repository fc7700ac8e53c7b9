"""The chapter's function on a small model, the verdict, the command line, and the script on both engines."""

import json
import subprocess
import sys

import pytest
import torch

from ch16 import inference_profiling
from ch16.inference_profiling import measure_cost, profile_inference, verdict
from ch16.parts.inference_profiling.attribution import KINDS
from ch16.parts.inference_profiling.tables import KIND_KEYS
from ch16.parts.inference_profiling.trace import read_trace
from ch16.parts.inference_profiling.work import Limits, Work
from common import models
from common.cli import CannotRun
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
    parts = profiled.parts
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


def test_the_cost_of_each_detail(network):
    rows = measure_cost(network, torch.ones(1, 8, dtype=torch.long), stacks=True, rounds=1)
    assert [row["what"] for row in rows] == ["off", "operations and kernels", "and shapes, memory", "and stacks"]
    assert rows[0]["prefill_ratio"] == rows[0]["decode_ratio"] == 1 and all(row["decode_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("flops", "gaps", "expected"),
    [(9, 0.1, "memory-bound"), (11, 0.1, "compute-bound"), (11, 0.51, "launch-bound"), (9, 0.5, "memory-bound")],
)
def test_verdicts(flops, gaps, expected):
    limits = Limits(flops_per_s=100.0, bytes_per_s=10.0, source="made up")
    assert limits.ridge == 10 and verdict(Work(flops, 1), limits, gaps) == expected


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
