"""Time what a device really does.

GPU work is asynchronous: a host clock around a kernel launch measures the launch. On a GPU the time comes
from CUDA events around each call; on a CPU from `perf_counter`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest values; ValueError of no values or another q."""
    if len(values) == 0:
        raise ValueError("a percentile of no values")
    return float(np.percentile(values, q))


def relative_spread(values: Sequence[float]) -> float:
    """Interquartile range over the median: a difference smaller than this is noise."""
    return (percentile(values, 75) - percentile(values, 25)) / percentile(values, 50)


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median over the median, for values that scatter about normally.

    sigma = interquartile range / 1.349, and the median of n values is uncertain by sqrt(pi / 2) * sigma / sqrt(n).
    """
    return math.sqrt(math.pi / 2) * relative_spread(values) / 1.349 / math.sqrt(len(values))


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one piece of work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return percentile(self.seconds, 50)


def measure(work: Callable[[], object], device: str = "cpu", warmup: int = 3, repeats: int = 10) -> Timing:
    """Time `work()` on "cpu" or "cuda", `repeats` (at least 1) times after `warmup` calls, which settle caches.

    `work` must leave its result on the device: reading it back is work as well.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    for _ in range(warmup):
        work()
    return _measure_cuda(work, repeats) if device == "cuda" else _measure_cpu(work, repeats)


def _measure_cpu(work: Callable[[], object], repeats: int) -> Timing:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


def _measure_cuda(work: Callable[[], object], repeats: int) -> Timing:
    import torch

    # All repeats are queued behind the warm-up and before the one synchronisation: while the device is busy the host
    # gets ahead of it, and its own overhead does not become part of the time.
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return Timing(tuple(start.elapsed_time(end) / 1e3 for start, end in events))


def measure_together(
    works: Mapping[str, Callable[[], object]], device: str = "cpu", warmup: int = 3, repeats: int = 10
) -> dict[str, Timing]:
    """Time several pieces of work turn by turn, so that clocks, heat and power limits treat them alike.

    A GPU at its power limit slows down within milliseconds: of two pieces timed one after the other the second
    would pay for the first. On a GPU each turn starts with a call that is not timed. Arguments as of `measure`.
    """
    for work in works.values():
        for _ in range(warmup):
            work()
    ahead = 1 if device == "cuda" else 0
    rounds = [{name: measure(work, device, ahead, 1).median for name, work in works.items()} for _ in range(repeats)]
    return {name: Timing(tuple(turn[name] for turn in rounds)) for name in works}


def graphed(work: Callable[[], object], warmup: int = 3) -> Callable[[], None]:
    """`work` captured in a CUDA graph: the returned function replays all its kernels with one launch.

    Inputs, outputs and sizes are those of the capture; `work` must not synchronise.
    """
    import torch

    stream = torch.cuda.Stream()  # capture is not allowed on the default stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):  # workspaces and compiled kernels come into being outside the graph
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
