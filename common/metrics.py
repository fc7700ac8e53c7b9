"""The chapter's Prometheus metrics, defined once. Labels are few and bounded.

inference_requests_total{outcome}      Counter    every request that asked for inference
inference_latency_seconds              Histogram  first byte of the request to last byte of the answer
inference_active_requests              Gauge      accepted and not yet answered
inference_throughput_tokens_per_sec    Gauge      output tokens/s over the last ten seconds
"""

from collections import deque

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

# What became of a request. Latency is observed for the first three: those the engine worked on.
OUTCOMES = ("ok", "error", "cancelled", "invalid", "rejected")
# 10 ms to 10 min, each about 1.5 times the one before: a P99 read from them is off by at most half.
LATENCY_BUCKETS = (
    0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 1.5, 2.5, 4, 6,
    10, 15, 25, 40, 60, 100, 150, 250, 400, 600,
)  # fmt: skip


class InferenceMetrics:
    """The four metrics on one registry.

    Raises:
        ValueError: the registry already has them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter("inference_requests", "Total requests", ["outcome"], registry=registry)
        self.latency = Histogram(
            "inference_latency_seconds", "Request latency", buckets=LATENCY_BUCKETS, registry=registry
        )
        self.active = Gauge("inference_active_requests", "Active requests", registry=registry)
        self.throughput = Gauge(
            "inference_throughput_tokens_per_sec", "Output tokens per second, last 10 s", registry=registry
        )
        for outcome in OUTCOMES:  # a series that exists from the start can be alerted on
            self.requests.labels(outcome)


class Rate:
    """Events per second over a sliding window, from readings of a counter that only grows."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, float]] = deque()  # (time, counter value), oldest first

    def update(self, now_s: float, value: float) -> float:
        """Add a reading and return the rate since the oldest one inside the window."""
        self._readings.append((now_s, value))
        while len(self._readings) > 2 and self._readings[1][0] <= now_s - self._window_s:
            self._readings.popleft()
        then_s, before = self._readings[0]
        return (value - before) / (now_s - then_s) if now_s > then_s else 0.0
