"""What a replica reports, and which metrics a manifest makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ch16.parts.autoscaling.hpa import PodsMetric, PoolMetric


@dataclass(frozen=True)
class Sample:
    """One scrape of a replica."""

    waiting: int  # vllm:num_requests_waiting, without a slot
    running: int  # vllm:num_requests_running, decoded together
    gpu: float  # DCGM_FI_DEV_GPU_UTIL / 100: the share of the time since the last scrape in which a kernel ran
    kv: float  # vllm:kv_cache_usage_perc, the share of the KV cache in use

    @property
    def active(self) -> int:
        """inference_active_requests: accepted and not yet answered."""
        return self.waiting + self.running


@dataclass(frozen=True)
class Signal:
    """A signal to scale on, with its name in tables, its lowest and its highest target."""

    title: str
    gauges: tuple[str, ...]  # fields of Sample; of several metrics with one target, the largest answer counts
    low: float
    high: float


def signals(slots: int) -> dict[str, Signal]:
    """The signals by their name on the command line, for replicas of `slots`. Shares are targets up to 1."""
    return {
        "queue": Signal("queue depth", ("waiting",), slots / 200, 5 * slots),
        "active": Signal("active requests = queue + running", ("active",), slots / 50, 5 * slots),
        "larger": Signal("queue or running, the larger", ("waiting", "running"), slots / 50, 5 * slots),
        "gpu": Signal("GPU utilization", ("gpu",), 0.05, 1.0),
        "kv": Signal("KV usage", ("kv",), 0.01, 1.0),
    }


# Samples that the autoscaler sees, number of replicas without one, ready replicas -> metrics.
Scaler = Callable[[Sequence[Sample], int, int], list[PodsMetric | PoolMetric]]


def by_pods(signal: Signal, target: float) -> Scaler:
    """A manifest with a Pods metric for each gauge of the signal (type AverageValue, the only one for Pods)."""
    return lambda samples, missing, ready: [
        PodsMetric(target, tuple(getattr(sample, gauge) for sample in samples), missing) for gauge in signal.gauges
    ]


def by_pool(target: float, per_pod: bool) -> Scaler:
    """A manifest with an External metric, the pool's sum of active requests: AverageValue if `per_pod`, else Value."""
    return lambda samples, missing, ready: [
        PoolMetric(target, sum(sample.active for sample in samples), ready, per_pod)
    ]
