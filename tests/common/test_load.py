"""Serving figures by hand; an engine driven step by step, on one that counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import load
from tests.engines import CountingLLM, counted


def test_figures_by_hand():
    """Two requests sent at 0 and 1 s; tokens at 2, 3, 5 s and at 4, 4.5, 6 s."""
    row = load.summarise([0.0, 1.0], [[2.0, 3.0, 5.0], [4.0, 4.5, 6.0]], gpus=2)
    assert row["concurrency"] == 2
    assert row["tokens_per_s"] == pytest.approx(6 / 6.0) and row["tokens_per_s_gpu"] == pytest.approx(0.5)
    assert row["ttft_p50_ms"] == pytest.approx(2500)  # 2 and 3 s
    assert row["tpot_p50_ms"] == pytest.approx(1250)  # (5-2)/2 and (6-4)/2
    assert row["itl_p99_ms"] == pytest.approx(1985)  # of 1, 2, 0.5, 1.5
    assert row["e2e_p99_ms"] == pytest.approx(5000)
    timed = {f"{name}_{p}_ms" for name in ("ttft", "tpot", "itl", "e2e") for p in ("p50", "p99")}
    assert row.keys() == {"concurrency", "tokens_per_s", "tokens_per_s_gpu"} | timed


def test_a_single_token_has_no_tpot():
    with pytest.raises(ValueError):
        load.summarise([0.0], [[1.0]], gpus=1)


def test_random_prompts_are_reproducible_and_share_nothing():
    prompts = load.random_prompts(8, 16, 1000, seed=3)
    assert prompts == load.random_prompts(8, 16, 1000, seed=3)
    assert len({tuple(p) for p in prompts}) == 8 and all(0 <= t < 1000 for p in prompts for t in p)


# ---- an engine, step by step ----


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setattr(load, "exactly", counted)


def test_requests_can_join_between_two_steps():
    llm = CountingLLM()
    engine = load.SteppedEngine(llm)
    engine.add("a", [1, 2], counted(3), priority=5)
    engine.step()
    engine.add("b", [3], counted(1))
    assert engine.running == 2 and llm.priorities == {"a": 5, "b": 0}
    assert [output.request_id for output in engine.step()] == ["a", "b"] and engine.running == 1
    engine.step()
    assert engine.running == 0 and llm.running == [1, 2, 1]
    assert {name: len(times) for name, times in engine.timeline.arrived.items()} == {"a": 3, "b": 1}
    assert [step.requests for step in engine.timeline.steps] == [1, 2, 1] and engine.timeline.ahead == 0
    assert engine.timeline.sent["a"] < engine.timeline.arrived["a"][0] < engine.timeline.sent["b"]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8), st.integers(5, 50))
def test_a_step_without_tokens_is_part_of_the_next(requests, budget):
    """Parts of a long prompt give no token: their time is in the step that does."""
    llm = CountingLLM(budget)
    engine = load.SteppedEngine(llm)
    for i, (tokens_in, tokens_out) in enumerate(requests):
        engine.add(str(i), [0] * tokens_in, counted(tokens_out))
    gave = [len(engine.step()) for _ in iter(lambda: engine.running, 0)]
    timeline = engine.timeline
    assert [step.requests for step in timeline.steps] == [n for n in gave if n] and len(gave) == len(llm.running)
    assert [len(times) for times in timeline.arrived.values()] == [tokens_out for _, tokens_out in requests]
    ends = [step.ended for step in timeline.steps]
    assert ends == sorted(ends) and {at for times in timeline.arrived.values() for at in times} <= set(ends)
    busy = sum(step.busy_s for step in timeline.steps)
    assert 0 < busy <= ends[-1] - min(timeline.sent.values())


def test_asynchronous_scheduling_is_a_step_ahead():
    llm = CountingLLM(ahead=True)
    engine = load.SteppedEngine(llm)
    engine.add("a", [1], counted(1))
    assert engine.timeline.ahead == 1
    assert engine.step() == [] and engine.running == 1 and engine.timeline.steps == []
    assert len(engine.step()) == 1 and engine.running == 0


def test_a_wave_is_sent_before_its_first_step():
    llm, seen = CountingLLM(), []
    sent, arrived = load.send_wave(llm, [[1], [2, 3], [4]], 2, on_step=lambda outputs: seen.append(len(outputs)))
    assert llm.running == [3, 3] and seen == [3, 3]
    assert len(sent) == 3 and [len(times) for times in arrived] == [2, 2, 2] and max(sent) <= arrived[0][0]
