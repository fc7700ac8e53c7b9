"""Long prompts among streams: order and counting on an engine that counts, rows and the claim from made-up runs."""

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch16.parts.continuous_batching.interference import (
    CHUNKED,
    NONE,
    SEPARATE,
    WHOLE,
    Run,
    Traffic,
    Way,
    best_chunked,
    interference_claim,
    interference_rows,
    run,
    token_budget,
    traffic_requests,
    ways,
)
from common.gpu import Machine

TRAFFIC = Traffic(streams=3, tokens=20, prompt=60, every=5, budgets=(33, 13), rounds=1)
CPU = Machine("cpu", "a CPU", 1, 2**30, 3, None, True, False)
GPUS = Machine("cuda", "a GPU", 2, 2**30, 16, (9, 0), True, True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.integers(1, 5),
    every=st.integers(1, 9),
    prompts=st.integers(1, 4),
    budget=st.integers(10, 200),
    ahead=st.booleans(),
)
def test_prompts_come_by_counting_and_take_as_many_steps_as_the_budget_says(
    counting_llm, streams, every, prompts, budget, ahead
):
    traffic = Traffic(streams, every * (prompts + 1), 60, every, (), 1)
    assert traffic.prompts == prompts
    llm = counting_llm(ahead=ahead)
    requests, long = traffic_requests(traffic, vocab_size=100, seed=0)
    with token_budget(llm, budget):
        found = run(llm, requests, long, every)
    assert llm.scheduler.max_num_scheduled_tokens == 10**9
    assert [len(gaps) for gaps in found.gaps_s] == [traffic.tokens] * streams
    assert found.tokens == streams * traffic.tokens + prompts * 61
    assert len(found.ttft_s) == prompts and all(seconds > 0 for seconds in found.ttft_s)
    chunk = budget - streams
    if math.ceil(60 / chunk) + ahead <= every:  # none has to wait for another
        assert found.steps == [math.ceil(60 / chunk)] * prompts


def test_a_separate_engine_gets_the_prompts(counting_llm):
    class Elsewhere:
        def __init__(self):
            self.got = []

        def send(self, prompt):
            self.got.append(prompt)

        def finished(self):
            return math.inf

    llm = counting_llm()
    streams, long = traffic_requests(TRAFFIC, vocab_size=100, seed=0)
    found = run(llm, streams, long, TRAFFIC.every, elsewhere := Elsewhere())
    assert elsewhere.got == [request.prompt for request in long]
    assert max(llm.running) == len(streams) and found.seconds == math.inf


def test_an_error_gives_the_budget_back(counting_llm):
    llm = counting_llm(budget=77)
    with pytest.raises(RuntimeError), token_budget(llm, 5):
        assert llm.scheduler.max_num_scheduled_tokens == 5
        raise RuntimeError
    with token_budget(llm, None):
        assert llm.scheduler.max_num_scheduled_tokens == 77


@pytest.mark.parametrize(
    ("machine", "separate", "where"),
    [
        (CPU, True, ["3 cores"] * 4 + ["1 of them", "1 + 2"]),
        (CPU, False, ["3 cores"] * 4),
        (GPUS, True, ["1 GPU"] * 4 + ["1 + 1 GPU"]),
        (GPUS, False, ["1 GPU"] * 4),
    ],
)
def test_the_ways_of_a_machine(machine, separate, where):
    found = ways(TRAFFIC, machine, separate)
    assert [way.where for way in found] == where
    assert [way.name for way in found][:4] == [NONE, WHOLE, CHUNKED, CHUNKED]
    assert len(set(found)) == len(found)


def made_up(itl_ms, seconds=1.0):
    gaps = [0.010] * 90 + [itl_ms / 1e3] * 10
    return [Run([gaps], [2], [0.5], seconds, 1000)]


def rows_of(chunked_ms, separate_ms, chunked_s=1.0):
    return interference_rows(
        {
            Way(NONE, "2 cores", prompts=False): made_up(10),
            Way(WHOLE, "2 cores"): made_up(100),
            Way(CHUNKED, "2 cores", 64): made_up(chunked_ms, chunked_s),
            Way(CHUNKED, "2 cores", 128): made_up(60),
            Way(NONE, "1 of them", prompts=False, half=True): made_up(15),
            Way(SEPARATE, "1 + 1", half=True, separate=True): made_up(separate_ms),
        }
    )


def test_rows():
    rows = rows_of(30, 20, chunked_s=2.0)
    assert [row["p99_ratio"] for row in rows] == pytest.approx([0.1, 1, 0.3, 0.6, 0.15, 0.2])
    assert [row.get("throughput_ratio") for row in rows] == [None, 1, 0.5, 1, None, 1]
    assert "steps" not in rows[-1] and rows[1]["steps"] == 2 and rows[1]["ttft_ms"] == 500
    assert rows[1]["itl_p50_ms"] == pytest.approx(10) and rows[1]["itl_max_ms"] == pytest.approx(100)


def test_rows_are_medians_of_rounds():
    noisy = {Way(WHOLE, "2 cores"): [*made_up(100), *made_up(300), *made_up(110)]}
    (row,) = interference_rows(noisy)
    assert row["itl_p99_ms"] == pytest.approx(110) and row["itl_max_ms"] == pytest.approx(110)


def test_the_best_chunk_keeps_the_throughput():
    assert best_chunked(rows_of(30, 20))["budget"] == 64
    assert best_chunked(rows_of(30, 20, chunked_s=2.0))["budget"] == 128
    slow = [row | {"throughput_ratio": 0.5} for row in rows_of(30, 20)]
    assert best_chunked(slow)["budget"] == 64


def test_the_claim():
    holds, fails, close = (interference_claim(rows_of(30, separate_ms), "") for separate_ms in (20, 40, 29))
    assert (holds.verdict, fails.verdict, close.verdict) == ("holds", "fails", "n/a") and "10%" in close.reason
    assert holds.measured.startswith("ITL P99 10.0 ms without long prompts, 100.0 with whole ones, 30.0 in chunks (64")
    assert holds.measured.endswith("20.0 on separate engines")
    alone = [row for row in rows_of(30, 20) if row["how"] != SEPARATE]
    undecided = interference_claim(alone, "one GPU")
    assert (undecided.verdict, undecided.reason) == ("n/a", "one GPU") and "separate" not in undecided.measured


def test_traffic_is_the_same_for_the_same_seed():
    assert traffic_requests(TRAFFIC, 100, 0) == traffic_requests(TRAFFIC, 100, 0)
    assert traffic_requests(TRAFFIC, 100, 0) != traffic_requests(TRAFFIC, 100, 1)
    streams, long = traffic_requests(dataclasses.replace(TRAFFIC, tokens=10), 100, 0)
    assert (len(streams), len(long)) == (3, 1) and streams[0].tokens_out == 11 and len(long[0].prompt) == 60
