"""Traffic for a fleet: load that comes in bursts, the curve of a day, a recorded trace."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ch16.parts.autoscaling.records import as_requests
from common.cli import CannotRun
from common.traces import Arrival, at_rate, read_trace, shrink

LoadCurve = Callable[[np.ndarray], np.ndarray]  # seconds -> load then, in replicas that it keeps busy

CALM, PEAK = 0.5, (4.0, 7.0)  # load between bursts; at the height of one, at least and at most
RISE_S, HOLD_S, PAUSE_S = 480.0, (300.0, 900.0), (300.0, 2700.0)  # of a burst, and between two
DAY_MEAN, DAY_SWING = 2.75, 0.8  # mean load of a day, and the part of it by which it goes up and down
SHORTEST_S = 3600.0  # a shorter recorded trace is repeated


def bursty(seconds: float, rng: np.random.Generator, rise_s: float = RISE_S) -> LoadCurve:
    """Calm, then bursts that rise, last and fall within minutes, at random times and of random heights."""
    corners, now = [(0.0, CALM)], 0.0
    while now < seconds:
        begin = now + rng.uniform(*PAUSE_S)
        peak, end = rng.uniform(*PEAK), begin + rise_s + rng.uniform(*HOLD_S)
        corners += [(begin, CALM), (begin + rise_s, peak), (end, peak), (end + rise_s, CALM)]
        now = end + rise_s
    times, loads = np.transpose(corners)
    return lambda at: np.interp(at, times, loads)


def diurnal(seconds: float) -> LoadCurve:
    """A day from midnight to midnight, compressed into `seconds`."""
    return lambda at: DAY_MEAN * (1 - DAY_SWING * np.cos(2 * np.pi * at / seconds))


def poisson(
    load: LoadCurve, seconds: float, request_s: float, lengths: Sequence[Arrival], rng: np.random.Generator
) -> np.ndarray:
    """Requests [N] of REQUEST: Poisson arrivals at the rate of a load, each `request_s` of it; lengths from a trace."""
    begins = np.arange(math.ceil(seconds))
    counts = rng.poisson(load(begins + 0.5) / request_s)
    at = np.repeat(begins, counts) + rng.random(counts.sum())
    requests = as_requests(lengths)[rng.integers(len(lengths), size=len(at))]
    requests["at_s"] = np.sort(at)
    return requests


def read_recorded(path: str | Path, max_gap_s: float) -> list[Arrival]:
    """A recorded trace that can be replayed; repeated until it lasts an hour.

    Raises:
        CannotRun: as `read_trace`; times that go back, `max_gap_s` without requests, or all of them at one time.
    """
    trace = read_trace(path, in_order=True)
    if not trace[-1].at_s:
        raise CannotRun(f"{path}: all {len(trace)} requests come at the same time")
    for earlier, later in itertools.pairwise(trace):
        if (gap_s := later.at_s - earlier.at_s) > max_gap_s:
            gap = f"no request for {gap_s / 3600:.1f} h from second {earlier.at_s:,.0f} on"
            raise CannotRun(f"{path} has a gap: {gap}; if that is no fault of the recording, raise --max-gap-s")
    rate = (len(trace) - 1) / trace[-1].at_s
    return at_rate(trace, max(len(trace), math.ceil(SHORTEST_S * rate)), rate)


def fitted(trace: Sequence[Arrival], busy_s: Callable[[int, int], float], longest: int) -> np.ndarray:
    """A trace at its own times: requests [N] of REQUEST of at most `longest` tokens, scaled to the mean of `diurnal`.

    `busy_s`: seconds that a request takes from a busy replica, by its tokens in and out.
    """
    factor = DAY_MEAN * trace[-1].at_s / sum(busy_s(arrival.tokens_in, arrival.tokens_out) for arrival in trace)
    return as_requests(shrink(trace, factor, longest))
