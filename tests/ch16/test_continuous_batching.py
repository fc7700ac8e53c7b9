"""Admission and interference by order and counting, the knee by property, settings and errors, and the whole script on
the real engine."""

import argparse
import math
import os
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ch16 import continuous_batching
from ch16.continuous_batching import (
    continuous,
    fixed_batches,
    measure_decode,
    measure_prefill,
    prepare,
    run_engine,
    run_streams,
    token_budget,
    with_knee,
)
from ch16.parts.continuous_batching.interference import CHUNKED, NONE, SEPARATE, WHOLE
from ch16.parts.continuous_batching.separate import cannot_separate
from ch16.parts.continuous_batching.tables import knee_of
from ch16.parts.continuous_batching.workload import Sweep, Traffic, random_requests, traffic_requests
from common.cli import CannotRun
from common.gpu import Machine, detect
from tests.ch16.parts.continuous_batching.made_up import size_rows
from tests.engines import CountingLLM, counted

CPU = Machine("cpu", "a CPU", 1, 2**40, 2, None, True, False)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 16, (9, 0), True, True)
SCRIPT = continuous_batching.__file__
TRAFFIC = Traffic(streams=3, tokens=20, prompt=60, every=5, budgets=(33, 13), rounds=1)


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setattr(continuous_batching, "exactly", counted)


# ---- admission ----

lengths_and_slots = {"lengths": st.lists(st.integers(1, 12), min_size=1, max_size=30), "slots": st.integers(1, 6)}


def test_all_at_once():
    llm = CountingLLM()
    timeline = run_engine(llm, random_requests(4, [3, 1, 2], vocab_size=100, seed=0), 3, continuous)
    assert [len(timeline.arrived[name]) for name in "012"] == [3, 1, 2]
    assert [step.requests for step in timeline.steps] == [3, 2, 1] and llm.running == [3, 2, 1]
    assert max(timeline.sent.values()) <= min(timeline.arrived["1"])
    assert all(list(times) == sorted(times) for times in timeline.arrived.values())


@pytest.mark.parametrize("admit", [fixed_batches, continuous])
def test_nothing_waiting_is_nothing_done(admit):
    assert run_engine(CountingLLM(), [], 4, admit).steps == []


@given(**lengths_and_slots)
def test_fixed_batches_start_when_the_slowest_is_done(lengths, slots):
    llm = CountingLLM()
    timeline = run_engine(llm, random_requests(2, lengths, 100, 0), slots, fixed_batches)
    expected = [
        sum(n > step for n in lengths[i : i + slots])
        for i in range(0, len(lengths), slots)
        for step in range(max(lengths[i : i + slots]))
    ]
    assert llm.running == expected
    assert [len(tokens) for tokens in timeline.arrived.values()] == lengths


@given(**lengths_and_slots)
def test_continuous_leaves_no_slot_free_while_a_request_waits(lengths, slots):
    llm = CountingLLM()
    timeline = run_engine(llm, random_requests(2, lengths, 100, 0), slots, continuous)
    waiting, left = list(lengths), []
    for running in llm.running:  # the same by a plain list of what each running request has left
        while waiting and len(left) < slots:
            left.append(waiting.pop(0))
        assert running == len(left) and (running == slots or not waiting)
        left = [n - 1 for n in left if n > 1]
    assert not waiting and not left
    assert [len(tokens) for tokens in timeline.arrived.values()] == lengths
    assert list(timeline.sent) == list(map(str, range(len(lengths))))  # in order


# ---- batch sizes ----


@given(st.floats(0.1, 100), st.floats(0.01, 10))
def test_the_knee_is_where_what_all_share_costs_as_much_as_what_each_adds(base, part):
    assume(2 < base / part < 128)
    first, last = knee_of(size_rows(base, part))
    # Within 10% of the highest power, x / (1 + x)^2 for x = batch / (base / part), is within a factor of two.
    assert base / part / 2.1 < first["batch"] <= last["batch"] < 2.1 * base / part


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=9))
def test_the_knee_by_looking_at_all(ms):
    rows = with_knee([{"batch": 2**i, "ms": t, "tokens_per_s": 1e3 * 2**i / t} for i, t in enumerate(ms)])
    power = [2**i / t**2 for i, t in enumerate(ms)]
    best = max(power)
    assert [bool(row["mark"]) for row in rows if not 0.899 < row["tokens_per_s"] / row["ms"] / best / 1e3 < 0.901] == [
        p > 0.9 * best for p in power if not 0.899 < p / best < 0.901
    ]


def test_decode_steps_that_read_prompts_are_left_out():
    llm = CountingLLM(budget=100)
    rows = measure_decode(llm, Sweep((1, 4, 16), tokens=30, repeats=5), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4, 16] and all(row["ms"] > 0 for row in rows)
    assert not llm.requests  # all were finished


def test_batches_that_do_not_fit_are_not_tried():
    llm = CountingLLM(budget=1000)
    llm.vllm_config.cache_config.num_gpu_blocks = 13  # of 16 tokens; a sequence of 30 + 7 tokens takes 3
    rows = measure_decode(llm, Sweep((1, 4, 16), tokens=30, repeats=5), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4]


def test_prefill_counts_the_prompts_tokens():
    llm = CountingLLM()
    rows = measure_prefill(llm, Sweep((1, 4), tokens=30, repeats=3), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4]
    assert [row["tokens_per_s"] * row["ms"] / 1e3 for row in rows] == pytest.approx([30, 120])
    assert llm.running == 3 * [1] + 3 * [4]


# ---- long prompts ----


@given(
    streams=st.integers(1, 5),
    every=st.integers(1, 9),
    prompts=st.integers(1, 4),
    budget=st.integers(10, 200),
    ahead=st.booleans(),
)
def test_prompts_come_by_counting_and_take_as_many_steps_as_the_budget_says(streams, every, prompts, budget, ahead):
    traffic = Traffic(streams, every * (prompts + 1), 60, every, (), 1)
    assert traffic.prompts == prompts
    llm = CountingLLM(ahead=ahead)
    requests, long = traffic_requests(traffic, vocab_size=100, seed=0)
    with token_budget(llm, budget):
        found = run_streams(llm, requests, long, every)
    assert llm.scheduler.max_num_scheduled_tokens == 10**9
    assert [len(gaps) for gaps in found.gaps_s] == [traffic.tokens] * streams
    assert found.tokens == streams * traffic.tokens + prompts * 61
    assert len(found.ttft_s) == prompts and all(seconds > 0 for seconds in found.ttft_s)
    chunk = budget - streams
    if math.ceil(60 / chunk) + ahead <= every:  # none has to wait for another
        assert found.steps == [math.ceil(60 / chunk)] * prompts


def test_a_separate_engine_gets_the_prompts():
    class Elsewhere:
        def __init__(self):
            self.got = []

        def send(self, prompt):
            self.got.append(prompt)

        def wait(self):
            return math.inf

    llm = CountingLLM()
    streams, long = traffic_requests(TRAFFIC, vocab_size=100, seed=0)
    found = run_streams(llm, streams, long, TRAFFIC.every, elsewhere := Elsewhere())
    assert elsewhere.got == [request.prompt for request in long]
    assert max(llm.running) == len(streams) and found.seconds == math.inf


def test_an_error_gives_the_budget_back():
    llm = CountingLLM(budget=77)
    with pytest.raises(RuntimeError), token_budget(llm, 5):
        assert llm.scheduler.max_num_scheduled_tokens == 5
        raise RuntimeError
    with token_budget(llm, None):
        assert llm.scheduler.max_num_scheduled_tokens == 77


# ---- the script ----


def arguments(**given):
    return argparse.Namespace(**{"dummy_weights": "tiny-llama", "quick": True, "seed": 3} | given)


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
