"""A second engine in its own process, which only reads prompts; and which cores or GPU each engine computes on."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from common.cli import CannotRun
from common.engine import start_engine
from common.gpu import Machine, device_names
from common.load import send_wave

GONE = "the prefill engine's process ended (VLLM_LOGGING_LEVEL=INFO shows its log)"


def cannot_separate(machine: Machine) -> str:
    """Why two engines on this machine would share what computes; empty if they would not."""
    if machine.device == "cuda":
        return "" if machine.count > 1 else "one GPU: two engines on it would disturb each other as in one batch"
    if not hasattr(os, "sched_setaffinity"):
        return "this system cannot keep a process on some of its cores"
    return "" if machine.cores > 1 else "one core"


class PrefillEngine(contextlib.AbstractContextManager):
    """An engine like this process's on the other half of the cores, or the second GPU; a context manager.

    Its prompts queue and are read one by one. Their KV cache is not sent anywhere. Its methods raise CannotRun if its
    process is gone, or its engine did not start.
    """

    def __init__(self, settings: Mapping[str, object], machine: Machine) -> None:
        context = multiprocessing.get_context("fork" if machine.device == "cpu" and _should_fork() else "spawn")
        self._pipe, childs_end = context.Pipe()
        self._process = context.Process(target=_work, args=(childs_end, self._pipe, dict(settings), machine))
        self._process.start()
        childs_end.close()  # so that the end of the process is the end of the pipe

    def send(self, prompt: Sequence[int]) -> None:
        """Queue a prompt."""
        try:
            self._pipe.send(prompt)
        except OSError:
            raise CannotRun(GONE) from None

    def wait(self) -> float:
        """Until the engine runs, then until the next prompt is done: when that was, by the clock of all processes."""
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise CannotRun(GONE) from None
        if isinstance(answer, str):
            raise CannotRun(f"the prefill engine: {answer}")
        return answer

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # its work is not needed any more
        self._process.join()
        self._pipe.close()


def _should_fork() -> bool:
    """Whether a fork pays and is safe.

    It pays where vLLM is imported: importing it again takes longer than the engine's start. It is safe where there is
    no other thread: a fork has no copies of them, and the locks they held stay locked.
    """
    return "vllm" in sys.modules and len(list(Path("/proc/self/task").iterdir())) == 1


def _work(pipe: Connection, end_of_script: Connection, settings: dict[str, object], machine: Machine) -> None:
    end_of_script.close()  # a copy: with it this process would wait for itself when the script is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the script, which then ends this process
    if machine.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = device_names(machine)[1]
    else:
        cores = half_of_cores(1)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))  # for OpenMP runtimes loaded later
        _compute_on(cores, dict.fromkeys(_openmp(), len(cores)))  # a fork inherits some that counted all cores
    with contextlib.suppress(EOFError, BrokenPipeError):  # the script is gone
        try:
            llm, _ = start_engine(settings)
        except CannotRun as error:
            pipe.send(str(error))
            return
        pipe.send(time.perf_counter())
        while True:
            send_wave(llm, [pipe.recv()], tokens_out=1)
            pipe.send(time.perf_counter())


# ---- cores ----


def half_of_cores(which: int) -> set[int]:
    """The first (0) or the other (1) half of the cores this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[: len(cores) // 2] if which == 0 else cores[len(cores) // 2 :])


@contextlib.contextmanager
def on_half_the_cores() -> Iterator[None]:
    """The engine of this process computes on the first half of the cores."""
    all_cores, half = os.sched_getaffinity(0), half_of_cores(0)
    threads = {runtime: runtime.omp_get_max_threads() for runtime in _openmp()}
    _compute_on(half, dict.fromkeys(threads, len(half)))
    try:
        yield
    finally:
        _compute_on(all_cores, threads)


def _compute_on(cores: set[int], threads: Mapping[ctypes.CDLL, int]) -> None:
    """All threads of this process on these cores, and so many threads per OpenMP runtime."""
    for task in Path("/proc/self/task").iterdir():  # each thread has its own affinity
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.sched_setaffinity(int(task.name), cores)
    for runtime, count in threads.items():
        runtime.omp_set_num_threads(count)


def _openmp() -> list[ctypes.CDLL]:
    """The OpenMP runtimes of this process.

    torch.set_num_threads knows torch's alone. Other packages bring their own, and vLLM's kernels call the one that was
    loaded first.
    """
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    names = ("libgomp", "libiomp", "libomp")
    return [ctypes.CDLL(path) for path in sorted(mapped) if Path(path).name.startswith(names)]
