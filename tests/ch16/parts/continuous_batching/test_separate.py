"""Who computes where; an engine in another process that fails says so, one that ends is noticed."""

import os
import signal
import sys

import pytest

from ch16.parts.continuous_batching import separate
from ch16.parts.continuous_batching.separate import PrefillEngine, cannot_separate, half_of_cores, on_half_the_cores
from common import load
from common.cli import CannotRun
from common.gpu import Machine, detect
from tests.engines import CountingLLM, counted

CPU = Machine("cpu", "a CPU", 1, 2**30, 2, None, True, False)


def machine(device, count=1, cores=8):
    return Machine(device, "", count, 2**30, cores, None, True, False)


def test_what_can_be_separated():
    assert cannot_separate(machine("cuda", 2)) == "" and cannot_separate(machine("cpu")) == ""
    assert "one GPU" in cannot_separate(machine("cuda", 1))
    assert cannot_separate(machine("cpu", cores=1)) == "one core"


@pytest.mark.parametrize("cores", [{0, 1}, {3, 5, 9}, set(range(8))])
def test_halves_have_all_cores_once(monkeypatch, cores):
    monkeypatch.setattr(separate.os, "sched_getaffinity", lambda pid: cores)
    first, other = half_of_cores(0), half_of_cores(1)
    assert first | other == cores and not first & other and 0 <= len(other) - len(first) <= 1


@pytest.mark.skipif(cannot_separate(detect("cpu")) != "", reason="one core")
def test_cores_and_threads_are_given_back():
    import torch  # brings an OpenMP runtime

    before, half = os.sched_getaffinity(0), half_of_cores(0)
    runtimes = separate._openmp()
    threads = [runtime.omp_get_max_threads() for runtime in runtimes]
    assert runtimes and max(threads) == torch.get_num_threads()
    with pytest.raises(RuntimeError), on_half_the_cores():
        assert os.sched_getaffinity(0) == half
        assert {runtime.omp_get_max_threads() for runtime in runtimes} == {torch.get_num_threads()} == {len(half)}
        raise RuntimeError
    assert os.sched_getaffinity(0) == before
    assert [runtime.omp_get_max_threads() for runtime in runtimes] == threads


class Pipe:
    """What the work process is given: prompts in, answers out."""

    def __init__(self, *prompts):
        self.prompts, self.answers = list(prompts), []

    def recv(self):
        if not self.prompts:
            raise EOFError
        return self.prompts.pop(0)

    def send(self, answer):
        self.answers.append(answer)

    def close(self):
        pass


@pytest.fixture
def on_gpus(monkeypatch):
    """The work of the other process in this one: nothing it sets may stay."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    handler = signal.getsignal(signal.SIGINT)
    yield machine("cuda", 2)
    signal.signal(signal.SIGINT, handler)


def test_prompts_are_read_one_by_one_on_the_second_gpu(monkeypatch, on_gpus):
    llm, pipe = CountingLLM(), Pipe([1, 2, 3], [4, 5])
    monkeypatch.setattr(load, "exactly", counted)
    monkeypatch.setattr(separate, "start_engine", lambda settings: (llm, 1.0))
    separate._work(pipe, Pipe(), {}, on_gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert llm.running == [1, 1]
    assert len(pipe.answers) == 3 and pipe.answers == sorted(pipe.answers)  # ready, and two times


def test_an_engine_that_does_not_start_says_so(monkeypatch, on_gpus):
    def fails(settings):
        raise CannotRun("vLLM did not start: no memory")

    pipe = Pipe()
    monkeypatch.setattr(separate, "start_engine", fails)
    separate._work(pipe, Pipe(), {}, on_gpus)
    engine = PrefillEngine.__new__(PrefillEngine)
    engine._pipe = Pipe(*pipe.answers)
    with pytest.raises(CannotRun, match="the prefill engine: vLLM did not start: no memory"):
        engine.wait()


def test_only_a_process_with_vllm_and_one_thread_is_forked(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(separate.Path, "iterdir", lambda path: iter([1]))
    assert separate._should_fork()
    monkeypatch.setattr(separate.Path, "iterdir", lambda path: iter([1, 2]))
    assert not separate._should_fork()
    monkeypatch.setattr(separate.Path, "iterdir", lambda path: iter([1]))
    monkeypatch.delitem(sys.modules, "vllm")
    assert not separate._should_fork()


def test_a_forked_process_ends_with_the_script(monkeypatch):
    """It has a copy of the script's end of the pipe, too, and would wait for itself."""
    monkeypatch.setattr(separate, "_should_fork", lambda: True)
    monkeypatch.setattr(separate, "start_engine", lambda settings: (None, 0.0))
    with PrefillEngine({}, CPU) as engine:
        engine.wait()
        engine._pipe.close()
        engine._process.join(60)
        assert engine._process.exitcode == 0


def test_a_process_that_ends_is_noticed():
    with PrefillEngine({"model": "/nowhere", "tensor_parallel_size": 1}, CPU) as engine:
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(CannotRun, match="process ended"):
            engine.wait()
    assert not engine._process.is_alive()
