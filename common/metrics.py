"""The Prometheus series of the server and of the gateway. Labels are few and bounded.

(kv_cache_monitor.py exports the series of its monitor; the stand-in, a few of vLLM's.)

A server (`monitoring.py`; `inference_serving.py --serve`, beside vLLM's own series; its stand-in):

    inference_requests_total{outcome}      Counter    requests for inference, also refused ones; not those without a key
    inference_latency_seconds              Histogram  arrival of the request's headers to the end of the answer
    inference_active_requests              Gauge      accepted and not yet answered
    inference_throughput_tokens_per_sec    Gauge      output tokens/s over about ten seconds
    inference_draining                     Gauge      1: stopping, after the requests in flight

The gateway, with `server` one of those it was given:

    gateway_requests_total{outcome}        Counter    every request except for its own pages
    gateway_retries_total                  Counter    attempts at another server, after the first of a request
    gateway_first_byte_seconds             Histogram  arrival to the first byte of a server's answer, in each attempt
    gateway_in_flight{server}              Gauge      requests at a server
    gateway_server_ready{server}           Gauge      1: its checks say so
    gateway_breaker_open{server}           Gauge      1: it failed lately
    gateway_draining                       Gauge      1: stopping, after the requests in flight
"""

import contextlib
import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# What became of a request. Latency is observed for the first three, where the request was accepted before.
OUTCOMES = ("ok", "error", "cancelled", "invalid", "rejected")
# 10 ms to 10 min, each bound 1.5 to 1.7 times the one before: a quantile lies in the same bucket as the true one, so it
# is wrong by at most this factor.
LATENCY_BUCKETS = (
    *(0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6),
    *(1, 1.5, 2.5, 4, 6, 10, 15, 25, 40, 60, 100, 150, 250, 400, 600),
)
GATEWAY_OUTCOMES = (
    "ok",  # a whole answer of a replica, other than a server error
    "error",  # a server error: of the replica, of the gateway, or no replica could answer
    "truncated",  # broken off in the middle; the client was told
    "rejected",  # by the gateway itself: key, path, a body too large or too late, draining
    "cancelled",  # the client left
)
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class InferenceMetrics:
    """The series of a server, on one registry; ValueError if it already has them."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter("inference_requests", "Total requests", ["outcome"], registry=registry)
        name = "inference_latency_seconds"
        self.latency = Histogram(name, "Request latency", buckets=LATENCY_BUCKETS, registry=registry)
        self.active = Gauge("inference_active_requests", "Active requests", registry=registry)
        name = "inference_throughput_tokens_per_sec"
        self.throughput = Gauge(name, "Output tokens per second, last 10 s", registry=registry)
        self.draining = Gauge("inference_draining", "1: finishing its last requests", registry=registry)
        for outcome in OUTCOMES:  # a series must exist before its first event, or rate() misses that one
            self.requests.labels(outcome)

    def process_request(self, function: Callable) -> Callable:
        """Decorator: a call of the function is a request: counted, active and timed, even if it fails.

        The function may be plain or async, or a generator of either kind that streams an answer: the request is active
        from the first part that is read until the stream ends or is closed.
        """
        if inspect.isasyncgenfunction(function):

            async def tracked(*args: object, **kwargs: object) -> object:
                with self.request():
                    async with contextlib.aclosing(function(*args, **kwargs)) as parts:
                        async for part in parts:
                            yield part

        elif inspect.isgeneratorfunction(function):

            def tracked(*args: object, **kwargs: object) -> object:
                with self.request():
                    return (yield from function(*args, **kwargs))

        elif inspect.iscoroutinefunction(function):

            async def tracked(*args: object, **kwargs: object) -> object:
                with self.request():
                    return await function(*args, **kwargs)

        else:

            def tracked(*args: object, **kwargs: object) -> object:
                with self.request():
                    return function(*args, **kwargs)

        return functools.wraps(function)(tracked)

    def request(self, accepted: bool = True) -> "TrackedRequest":
        """`with metrics.request():` is the decorator for a block; `accepted=False`: it may still be refused."""
        return TrackedRequest(self, accepted)


class TrackedRequest:
    """One request, as a context manager around all its work.

    The end of the block counts it by `outcome`, one of OUTCOMES; an exception as `error`, or as `cancelled` if it only
    stops the work (a cancelled task, a closed stream).
    """

    def __init__(self, metrics: InferenceMetrics, accepted: bool) -> None:
        self._metrics, self._accepted = metrics, accepted
        self.outcome = "ok"

    def accept(self) -> None:
        """It will be answered: it is active from now on, and its latency counts (from the start of the block)."""
        self._accepted = True
        self._metrics.active.inc()

    def __enter__(self) -> "TrackedRequest":
        self._came = time.perf_counter()
        if self._accepted:
            self.accept()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.outcome = "error" if issubclass(kind, Exception) else "cancelled"
        self._metrics.requests.labels(self.outcome).inc()
        if self._accepted:
            self._metrics.active.dec()
            if self.outcome in OUTCOMES[:3]:
                self._metrics.latency.observe(time.perf_counter() - self._came)


class GatewayMetrics:
    """The series of the gateway, on a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("gateway_requests", "Requests by what became of them", ["outcome"], registry=registry)
        self.retries = Counter("gateway_retries", "Attempts after the first of a request", registry=registry)
        name, text = "gateway_first_byte_seconds", "Arrival of a request to the first byte of a server's answer"
        self.first_byte = Histogram(name, text, buckets=FIRST_BYTE_BUCKETS, registry=registry)
        self.draining = Gauge("gateway_draining", "1: finishing its last requests", registry=registry)
        self._states = {
            "in_flight": Gauge("gateway_in_flight", "Requests at a server", ["server"], registry=registry),
            "ready": Gauge("gateway_server_ready", "1: its checks say so", ["server"], registry=registry),
            "breaker_open": Gauge("gateway_breaker_open", "1: it failed lately", ["server"], registry=registry),
        }
        for outcome in GATEWAY_OUTCOMES:
            self.requests.labels(outcome)

    def render(self, states: Mapping[str, Mapping[str, float]]) -> bytes:
        """The page of /metrics, with the state of each current server."""
        for name, gauge in self._states.items():
            gauge.clear()  # a removed server leaves no series
            for server, state in states.items():
                gauge.labels(server).set(state[name])
        return generate_latest(self._registry)


class Rate:
    """Events per second over the last `window_s` or a little more, from readings of a counter."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, float]] = deque()  # (time, counter value), oldest first

    def update(self, now_s: float, value: float) -> float:
        """Add a reading. Returns the rate since the newest at least a window old, or since the first (0.0 at it)."""
        self._readings.append((now_s, value))
        while len(self._readings) > 2 and self._readings[1][0] <= now_s - self._window_s:
            self._readings.popleft()
        then_s, before = self._readings[0]
        return (value - before) / (now_s - then_s) if now_s > then_s else 0.0


def histogram_quantile(q: float, buckets: Iterable[tuple[float, float]]) -> float | None:
    """The quantile 0 < q <= 1 of (upper bound, observations up to it), as Prometheus has it: linear within a bucket.

    The highest finite bound if the quantile is beyond it; None if nothing was observed.
    """
    buckets = sorted(buckets)
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = q * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            break
        lower, below = bound, count
    if bound == float("inf"):
        return lower
    return min(bound, lower + (bound - lower) * (rank - below) / (count - below))  # rounding must not leave the bucket
