import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from ch16 import serving_layouts
from ch16.parts.serving_layouts.flags import machine_type
from ch16.parts.serving_layouts.launch import Service, cache_tokens, running
from ch16.serving_layouts import (
    Layout,
    busy,
    choose,
    meets,
    parse_layout,
    plan_memory,
    possible_layouts,
    price_of_a_million,
    problem,
    replica_commands,
)
from common import models, targets
from common.cli import CannotRun
from common.gpu import Machine, detect
from common.loadclient import Objective
from common.models import SHAPES, Model
from common.server import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = Objective(ttft_ms=10_000, tpot_ms=50)
CONFIG, TINY = SHAPES["deepseek-coder-33b"], SHAPES["tiny-llama"]
LARGE = Model("p", "deepseek-coder-33b", CONFIG, dummy=True)
H100 = Machine("cuda", "H100", 8, 81559 * 2**20, 128, (9, 0), native_bf16=True, native_fp8=True)
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
MODEL = Model("owner/model", "model", CONFIG)


def row(tokens_per_s, p99, errors=0, **figures):
    return {"tokens_per_s": tokens_per_s, "tpot_p50_ms": 40.0, "tpot_p99_ms": p99, "errors": errors, **figures}


# ---- which is best ----


def test_the_best_row_keeps_the_objective():
    rows = [row(100, 20), row(200, 50), row(300, 51), row(400, 30, errors=1)]
    good = partial(meets, objective=OBJECTIVE)
    assert targets.best_row(rows, good) is rows[1]
    assert [r["best"] for r in targets.marked(rows, good, "<- misses SLO")] == ["", "<- best", "", ""]
    assert [r["best"] for r in targets.marked(rows[2:], good, "<- misses SLO")] == ["", "<- misses SLO"]


def test_the_price():
    assert price_of_a_million(1e6 / 3600, 20.0) == pytest.approx(20)  # a million in an hour


def test_idle_samples_around_the_work_do_not_count():
    assert busy([0, 0, 80, 0, 100, 0]) == 60
    assert busy([0, 0]) is busy([]) is None


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


# ---- what fits ----


def test_layouts_of_the_chapters_model():
    assert list(map(str, possible_layouts(CONFIG, 8))) == ["8 x TP=1", "4 x TP=2", "2 x TP=4", "1 x TP=8"]
    assert list(map(str, possible_layouts(TINY, 2))) == ["2 x TP=1", "1 x TP=2"]
    assert parse_layout("2x4") == Layout(replicas=2, ranks=4)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 48), st.integers(1, 16))
def test_against_every_pair_of_numbers(kv_heads, group, mlp, devices):
    heads = kv_heads * group
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    twin = {
        Layout(replicas, ranks)
        for replicas in range(1, devices + 1)
        for ranks in range(1, devices + 1)
        if replicas * ranks == devices and heads % ranks == mlp % ranks == 0
        if kv_heads % ranks == 0 or ranks % kv_heads == 0
    }
    found = possible_layouts(config, devices)
    assert set(found) == twin and len(found) == len(twin) and found[0] == Layout(devices, 1)


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x-1", "axb", "2x2x2"])
def test_no_layouts(text):
    with pytest.raises(ValueError):  # argparse names the flag and the text
        parse_layout(text)


def test_processes():
    assert Layout(8, 1).processes == 1 + 8 * 2  # each replica: the API server, and the engine that computes itself
    assert Layout(2, 4).processes == 1 + 2 * (2 + 4)


def test_room_of_one_gpu_against_the_run_on_an_h100():
    """There was room for 303 sequences of 1,024 tokens, the run says."""
    content = json.loads((ROOT / "results" / "h100" / "inference_serving.json").read_text())
    measured = max(row["concurrency"] for row in content["tables"]["load"]["rows"])
    plan = plan_memory(CONFIG, Layout(1, 1), H100, fp8=True)
    assert plan.tokens / 1024 == pytest.approx(measured, rel=0.05)


def test_room_by_hand():
    one, all_eight = (plan_memory(CONFIG, layout, H100, fp8=False) for layout in (Layout(8, 1), Layout(1, 8)))
    assert one.weights == pytest.approx(2 * 33.343e9, rel=1e-4) and all_eight.weights == pytest.approx(one.weights / 8)
    a_token = 2 * 62 * 8 * 128 * 2  # K and V, layers, KV heads, their width, BF16
    assert one.tokens == 8 * int(one.cache // a_token) and all_eight.tokens == int(8 * all_eight.cache // a_token)
    fp8 = plan_memory(CONFIG, Layout(8, 1), H100, fp8=True)
    assert fp8.weights == pytest.approx(33.343e9 + 2 * 32256 * 7168, rel=1e-4)  # embedding and head stay BF16


def test_ranks_beyond_the_kv_heads_hold_copies():
    config = CONFIG | {"num_key_value_heads": 2}
    two, four = (plan_memory(config, Layout(1, ranks), H100, fp8=True) for ranks in (2, 4))
    assert four.tokens / two.tokens == pytest.approx(four.cache / two.cache)


@given(st.sampled_from([1, 2, 4]), st.integers(16, 200), st.booleans())
def test_what_does_not_fit_is_refused(ranks, memory, fp8):
    machine, layout = replace(H100, memory_bytes=memory * 2**30), Layout(8 // ranks, ranks)
    plan = plan_memory(CONFIG, layout, machine, fp8)
    each = plan.tokens // layout.replicas
    assert bool(problem(CONFIG, layout, machine, fp8, 4096)) == (each < 4096)


@pytest.mark.parametrize(
    ("layout", "memory", "text"),
    [
        (Layout(8, 2), 80, "it needs 16 devices, there are 8"),
        (Layout(1, 5), 80, "56 attention heads do not divide over 5 ranks"),
        (Layout(8, 1), 40, "62 GiB of weights on each device, of which 36 GiB can be used"),
        (Layout(8, 1), 74, "a KV cache of 2"),
        (Layout(8, 1), 80, ""),
    ],
)
def test_problems_in_words(layout, memory, text):
    found = problem(CONFIG, layout, replace(H100, memory_bytes=memory * 2**30), False, 4096)
    assert found.startswith(text) and bool(found) == bool(text)


def test_what_does_not_divide_is_named():
    narrow = TINY | {"intermediate_size": 255}
    assert problem(narrow, Layout(1, 2), H100, False, 16) == "an MLP 255 wide does not divide over 2 ranks"


def test_a_model_of_unknown_size_is_not_refused():
    config = CONFIG | {"model_type": "something-new"}
    assert (
        plan_memory(config, Layout(8, 1), H100, fp8=True) is None and problem(config, Layout(8, 1), H100, True, 1) == ""
    )


# ---- the replicas ----


def service(gpus=8, at_once=64, model=MODEL):
    return Service(model, replace(H100, count=gpus), [f"GPU-{i}" for i in range(gpus)], at_once)


def flag(command, name):
    return command.words[command.words.index(name) + 1]


@given(st.integers(1, 16), st.integers(1, 4000))
def test_replicas_share_devices_and_requests(gpus, at_once):
    asked = service(gpus, at_once)
    for layout in possible_layouts(MODEL.config, gpus):
        commands = replica_commands(layout, asked)
        groups = [command.env["CUDA_VISIBLE_DEVICES"].split(",") for command in commands]
        assert [name for group in groups for name in group] == asked.devices  # each device once
        assert {len(group) for group in groups} == {layout.ranks} and len(groups) == layout.replicas
        assert all(flag(command, "--tensor-parallel") == str(layout.ranks) for command in commands)
        seats = [int(flag(command, "--max-num-seqs")) for command in commands]
        assert at_once <= sum(seats) < at_once + layout.replicas
        graphs = "--max-cudagraph-capture-size" in commands[0].words
        assert graphs == (seats[0] > serving_layouts.GRAPHS_UP_TO)  # no batch without CUDA graphs


def test_what_the_host_says_of_multicast_reaches_a_replica(monkeypatch, tmp_path):
    for name, value in MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    (command,) = replica_commands(Layout(1, 8), service())
    assert set(command.env) == {"CUDA_VISIBLE_DEVICES"}  # nothing is turned on that the host turned off
    code = "import os; print(*(f'{name}={value}' for name, value in os.environ.items()), sep='\\n')"
    process = ServerProcess([sys.executable, "-c", code], tmp_path, command.env).start()
    process.process.wait(30)
    seen = process.log.read_text().splitlines()
    assert {f"{name}={value}" for name, value in {**MULTICAST_OFF, **command.env}.items()} <= set(seen)


def test_random_weights_get_words(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    (command,) = replica_commands(Layout(1, 1), service(1, model=models.dummy("tiny-llama")))
    assert flag(command, "--dummy-weights") == str(tmp_path / "shapes" / "tiny-llama")
    assert flag(command, "--tokenizer") == str(tmp_path / "words" / "512") and "--model" not in command.words
    (command,) = replica_commands(Layout(1, 1), service(1))
    assert flag(command, "--model") == "owner/model" and "--tokenizer" not in command.words


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


@pytest.mark.slow
def test_two_ranks_of_the_real_engine(tmp_path):
    """Tensor parallelism behind the gateway, as on GPUs; processes and KV cache are what the plan says."""
    layout, model = Layout(1, 2), models.dummy("tiny-llama")
    cpu = replace(H100, count=2, device="cpu", native_fp8=False, native_bf16=detect("cpu").native_bf16)
    with running(replica_commands(layout, Service(model, cpu, [], at_once=4)), tmp_path) as (gateway, replicas):
        body = {"model": "tiny-llama", "prompt": "t1 t22 t333", "max_tokens": 5, "ignore_eos": True}
        answer = requests.post(f"{gateway.url}/v1/completions", json=body, timeout=120).json()
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 5)
        assert cache_tokens(replicas) == plan_memory(model.config, layout, cpu, fp8=False).tokens
        started = [one for server in (gateway, *replicas) for one in family(server.process.pid)]
        assert len(started) == layout.processes
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started)


def family(pid):
    """A process and what it has started, without Python's own helper for shared memory."""
    parent = psutil.Process(pid)
    children = parent.children(recursive=True)
    return [parent, *(one for one in children if "resource_tracker" not in " ".join(one.cmdline()))]
