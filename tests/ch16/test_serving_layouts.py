import argparse
import json
import sys
from dataclasses import replace

import pytest

from ch16 import serving_layouts
from ch16.parts.serving_layouts.plan import Layout
from ch16.serving_layouts import best_row, busy, choose, claims, machine_type, marked, price_of_a_million
from common.cli import CannotRun
from common.gpu import detect
from common.loadclient import Objective
from common.models import SHAPES, Model

OBJECTIVE = Objective(ttft_ms=10_000, tpot_ms=50)
LARGE = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"], dummy=True)
H100S = machine_type("8x80")


def row(tokens_per_s, p99, errors=0, **figures):
    return {"tokens_per_s": tokens_per_s, "tpot_p50_ms": 40.0, "tpot_p99_ms": p99, "errors": errors, **figures}


# ---- which is best ----


def test_the_best_row_keeps_the_objective():
    rows = [row(100, 20), row(200, 50), row(300, 51), row(400, 30, errors=1)]
    assert best_row(rows, OBJECTIVE) is rows[1]
    assert [r["best"] for r in marked(rows, OBJECTIVE)] == ["", "<- best", "", ""]
    assert [r["best"] for r in marked(rows[2:], OBJECTIVE)] == ["", "<- misses the objective"]


def test_the_price():
    assert price_of_a_million(1e6 / 3600, 20.0) == pytest.approx(20)  # a million in an hour


def test_idle_samples_around_the_work_do_not_count():
    assert busy([0, 0, 80, 0, 100, 0]) == 60
    assert busy([0, 0]) is busy([]) is None


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
    best = row(31_000.0, 48.0, utilization=90.0) | change
    found = claims(best, Layout(gpus, 1), model, H100S)
    assert [v.claim for v in found] == ["S1", "S2", "S3", "S4"] and [v.verdict for v in found] == verdicts
    assert all(reason in v.reason for v in found if v.verdict == "n/a")


def test_claims_on_a_cpu():
    found = claims(row(9.0, 9.0, utilization=None), Layout(1, 2), LARGE, replace(H100S, device="cpu"))
    assert {v.verdict for v in found} == {"n/a"} and "this is a CPU" in found[0].reason


def test_layouts_that_cannot_run(capsys):
    """BF16 weights of the 33B model do not fit on one 48 GB GPU."""
    args, host = argparse.Namespace(layouts=None), machine_type("8x48")
    assert list(map(str, choose(args, LARGE, False, host))) == ["4 x TP=2", "2 x TP=4", "1 x TP=8"]
    assert "left out: 8 x TP=1: 62 GiB of weights" in capsys.readouterr().out
    assert list(map(str, choose(args, LARGE, True, host))) == ["8 x TP=1", "4 x TP=2", "2 x TP=4", "1 x TP=8"]
    args.layouts = [Layout(1, 8), Layout(8, 1)]
    with pytest.raises(CannotRun, match="8 x TP=1 cannot run here: 62 GiB"):
        choose(args, LARGE, False, host)
    assert list(map(str, choose(args, None, False, host))) == ["8 x TP=1"]  # stand-ins, of which there is no other
    assert "left out: 1 x TP=8: a stand-in has no ranks" in capsys.readouterr().out


# ---- the command line ----


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["serving_layouts.py", *flags])
    monkeypatch.setattr(serving_layouts, "measure_layout", lambda *_: pytest.fail("work has started"))
    with pytest.raises(SystemExit) as stopped:
        serving_layouts.cli.run(serving_layouts.main)
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--layouts", "1x4"], 1, "1 x TP=4 cannot run here: it needs 4 devices, there are 2"),
        (["--layouts", "1x2", "--dummy-weights", "gpt-99"], 1, "no shape 'gpt-99'"),
        (["--layouts", "eight"], 2, "argument --layouts: invalid parse_layout value: 'eight'"),
        (["--machine", "8x80"], 2, "--machine belongs to --dry-run"),
        (["--dry-run", "--machine", "8"], 2, "argument --machine"),
        (["--requests", "0"], 2, "must be at least 1"),
        (["--gpu-hour-price", "-1"], 2, "must be above 0"),
        (["--quick", "--layouts", "1x2"], 1, "1 x TP=2 cannot run here: a stand-in has no ranks"),
        (["--quantization", "fp8"], 1, "has no FP8 units"),
        (["--dry-run", "--machine", "8x80", "4x80", "--layouts", "8x1"], 1, "8 x TP=1 does not fit on 4 x 80 GB"),
        (["--dry-run", "--machine", "1x24"], 1, "1 x TP=1 does not fit on 1 x 24 GB: 31 GiB of weights"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, flags, status, message):
    found, _, error = run(monkeypatch, capsys, "--device", "cpu", *flags)
    assert found == status and message in error
    assert status == 2 or (error.startswith("error: ") and error.count("\n") == 1)


def test_the_dry_run_of_the_chapters_machine(monkeypatch, capsys, tmp_path):
    status, out, _ = run(monkeypatch, capsys, "--dry-run", "--json", str(tmp_path / "plan.json"))
    rows = json.loads((tmp_path / "plan.json").read_text())["tables"]["plan"]["rows"]
    assert status == 0 and len(rows) == 2 * 4 and not any(row["problem"] for row in rows)
    assert out.count("inference_serving.py --serve") == 8 + 4 + 2 + 1 and out.count("load_balancer.py --servers") == 4
    assert "CUDA_VISIBLE_DEVICES=4,5,6,7 python3 ch16/inference_serving.py" in out and str(tmp_path) in out
    for smaller, larger in zip(rows[:4], rows[4:], strict=True):
        assert smaller["cache_tokens"] < larger["cache_tokens"] and smaller["weights_gib"] == larger["weights_gib"]
    assert [row["cache_tokens"] for row in rows[:4]] == sorted(row["cache_tokens"] for row in rows[:4])


def test_a_layout_that_does_not_fit_is_marked(monkeypatch, capsys):
    """BF16 weights of the 33B model: one 48 GB GPU does not hold them, two do."""
    status, out, _ = run(monkeypatch, capsys, "--dry-run", "--machine", "8x48", "--quantization", "none")
    assert status == 0 and "62 GiB of weights on each device, of which 43 GiB can be used" in out
    assert out.count("--tensor-parallel 1 ") == 0 and out.count("--tensor-parallel 2 ") == 4


def figures(layout, loads):
    keys = ("ttft_p50_ms", "ttft_p99_ms", "goodput", "good_percent", "late_ms", "tokens_per_s_device")
    rows = [row(100.0 * layout.replicas, 20.0, utilization=None, **dict.fromkeys(keys, 1.0)) for _ in loads]
    for figure, load in zip(rows, loads, strict=True):
        figure |= {"layout": str(layout), "at_once": load.requests}
    return rows, {"start_s": 1.0, "measured_cache_tokens": 2**18}


@pytest.mark.parametrize(("broken", "status"), [(["2 x TP=1"], 0), (["1 x TP=1", "2 x TP=1", "1 x TP=2"], 1)])
def test_a_layout_that_fails_does_not_lose_the_others(monkeypatch, capsys, tmp_path, broken, status):
    def measure(layout, service, loads, objective):
        if str(layout) in broken:
            raise CannotRun(f"{layout} broke")
        return figures(layout, loads)

    monkeypatch.setattr(serving_layouts, "measure_layout", measure)
    file = tmp_path / "layouts.json"
    flags = ("--device", "cpu", "--gpu-hour-price", "3.6", "--json", str(file), "--plot", str(tmp_path / "layouts.png"))
    monkeypatch.setattr(sys, "argv", ["serving_layouts.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        serving_layouts.cli.run(serving_layouts.main)
    assert stopped.value.code == status and "left out: 2 x TP=1: 2 x TP=1 broke" in capsys.readouterr().err
    if status == 0:
        tables = json.loads(file.read_text())["tables"]
        assert [r["layout"] for r in tables["layouts"]["rows"]] == ["1 x TP=1"] * 2 + ["1 x TP=2"] * 2
        assert [r["price"] for r in tables["layouts"]["rows"]] == pytest.approx([10, 10, 20, 20])  # two devices, paid
        one = 2**19 // detect("cpu").itemsize
        assert [r["cache_tokens"] for r in tables["starts"]["rows"]] == [one, 2 * one]


# ---- the processes ----


@pytest.mark.slow
def test_stand_ins(quick_run):
    done = quick_run("python3", "ch16/serving_layouts.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    table = done.json["tables"]["layouts"]
    assert "simulated" in table["title"] and {row["layout"] for row in table["rows"]} == {"1 x TP=1", "2 x TP=1"}
    assert all(row["errors"] == 0 and row["good_percent"] == pytest.approx(100) for row in table["rows"])
    one, two = (max(r["tokens_per_s"] for r in table["rows"] if r["layout"] == n) for n in ("1 x TP=1", "2 x TP=1"))
    assert two > 1.2 * one  # the simulated engines are independent, and the gateway uses both
