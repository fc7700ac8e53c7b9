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


class PrefillEngine:
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

    def wait_ready(self) -> None:
        """Return when the engine runs."""
        self._receive()

    def send(self, prompt: Sequence[int]) -> None:
        """Queue a prompt."""
        try:
            self._pipe.send(prompt)
        except OSError:
            raise CannotRun(GONE) from None

    def finished(self) -> float:
        """When the next prompt in the queue was done, by `time.perf_counter`, which all processes share."""
        return self._receive()

    def _receive(self) -> float:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise CannotRun(GONE) from None
        if isinstance(answer, str):
            raise CannotRun(f"the prefill engine: {answer}")
        return answer

    def __enter__(self) -> "PrefillEngine":
        return self

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
        os.environ["OMP_NUM_THREADS"] = str(
            len(cores)
        )  # for OpenMP runtimes loaded later; a fork inherits some that counted all cores
        _compute_on(cores, _openmp())
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
def on_half_the_cores(machine: Machine) -> Iterator[None]:
    """The engine of this process computes on the first half of the cores; on GPUs nothing changes."""
    if machine.device == "cuda":
        yield
        return
    all_cores, runtimes = os.sched_getaffinity(0), _openmp()
    threads = [runtime.omp_get_max_threads() for runtime in runtimes]
    _compute_on(half_of_cores(0), runtimes)
    try:
        yield
    finally:
        _move_threads(all_cores)
        for runtime, before in zip(runtimes, threads, strict=True):
            runtime.omp_set_num_threads(before)


def _compute_on(cores: set[int], runtimes: Sequence[ctypes.CDLL]) -> None:
    """All threads of this process on these cores, and per OpenMP runtime one thread per core."""
    _move_threads(cores)
    for runtime in runtimes:
        runtime.omp_set_num_threads(len(cores))


def _openmp() -> list[ctypes.CDLL]:
    """The OpenMP runtimes of this process.

    torch.set_num_threads knows torch's alone. Other packages bring their own, and vLLM's kernels call the one that was
    loaded first.
    """
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return [
        ctypes.CDLL(path) for path in sorted(mapped) if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))
    ]


def _move_threads(cores: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():  # each thread has its own affinity
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.sched_setaffinity(int(task.name), cores)
