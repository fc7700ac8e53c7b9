"""Steps of vLLM found in a trace; the whole way is tested with the script."""

import sys

import pytest

from ch16.parts.inference_profiling.engine import profile_engine, start_profiled_engine, step_spans
from ch16.parts.inference_profiling.trace import Event, Trace
from common.cli import CannotRun

ENGINE = "ch16.parts.inference_profiling.engine"
PREFILL, DECODE = "execute_context_1(256)_generation_0(0)", "execute_context_0(0)_generation_1(1)"


def steps(*names, shift=0.0):
    return [Event(name, i + shift, i + shift + 0.5, 3) for i, name in enumerate(names)]


def test_phases_go_from_start_to_start():
    trace = Trace([], [], steps("other", PREFILL, DECODE, DECODE, DECODE), [])
    assert step_spans(trace, 1, 2) == {"prefill": Event("prefill", 1, 2, 3), "decode": Event("decode", 2, 4, 3)}


def test_a_prompt_in_chunks_is_one_phase():
    trace = Trace([], [], steps(PREFILL, PREFILL, DECODE, DECODE), [])
    assert step_spans(trace, 1, 1)["prefill"] == Event("prefill", 0, 2, 3)


def test_the_device_counts_where_it_has_ranges():
    names = (PREFILL, DECODE, DECODE)
    trace = Trace([], [], steps(*names), steps(*names, shift=0.25))
    assert step_spans(trace, 1, 1)["prefill"].start == 0.25


@pytest.mark.parametrize("names", [(), (PREFILL,), (DECODE, DECODE), (PREFILL, DECODE), (DECODE, PREFILL, DECODE)])
def test_steps_that_are_missing(names):
    with pytest.raises(CannotRun, match=r"prefill and then \d decode steps; 1 and 2 are needed"):
        step_spans(Trace([], [], steps(*names), []), 1, 1)


def test_steps_of_a_part_of_the_batch_do_not_count():
    full, part = "execute_context_0(0)_generation_4(4)", "execute_context_0(0)_generation_3(3)"
    trace = Trace([], [], steps(PREFILL, full, full, part), [])
    assert step_spans(trace, 4, 1)["decode"] == Event("decode", 1, 2, 3)
    with pytest.raises(CannotRun, match="1 prefill and then 2 decode steps; 1 and 3 are needed"):
        step_spans(trace, 4, 2)


def test_a_step_of_both_is_refused():
    mixed = "execute_context_5(1000)_generation_4(4)"
    with pytest.raises(CannotRun, match=r"mixed prefill and decode in a step \(execute_context_5"):
        step_spans(Trace([], [], steps(PREFILL, mixed, DECODE, DECODE), []), 1, 1)


def test_a_missing_vllm_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    with pytest.raises(CannotRun, match="vLLM cannot be imported"):
        start_profiled_engine({}, "", False)


class BrokenEngine:
    """Answers no request, and cannot profile."""

    def start_profile(self):
        raise RuntimeError("the worker died\ntraceback")


def test_an_engine_that_cannot_profile_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(f"{ENGINE}.send_wave", lambda llm, prompts, out: ([0.0], [[1.0] * out]))
    with pytest.raises(CannotRun, match=r"^vLLM could not profile: the worker died$"):
        profile_engine(BrokenEngine(), str(tmp_path), 1, 8, 2, 100, 0)


def test_no_trace_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(f"{ENGINE}.send_wave", lambda llm, prompts, out: ([0.0], [[1.0] * out]))
    monkeypatch.setattr(BrokenEngine, "start_profile", lambda self: None)
    monkeypatch.setattr(BrokenEngine, "stop_profile", lambda self: None, raising=False)
    with pytest.raises(CannotRun, match="vLLM wrote 0 traces"):
        profile_engine(BrokenEngine(), str(tmp_path), 1, 8, 2, 100, 0)
