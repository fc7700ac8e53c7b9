"""The algorithm of the Kubernetes HorizontalPodAutoscaler (autoscaling/v2), as a pure function.

Written from its documentation (https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/,
sections "Algorithm details" and "Configurable scaling behavior") and, where that is silent, from its controller
(kubernetes/kubernetes, pkg/controller/podautoscaler: replica_calculator.go, horizontal.go). Quantities are thousandths
there, and averages of them are cut to whole thousandths; here, too. Left out: CPU and memory, which are shares of a
pod's request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SELECT = ("Max", "Min", "Disabled")


@dataclass(frozen=True)
class Policy:
    """A scaling policy: at most `value` pods ("Pods"), or percent of them ("Percent"), within `period_s`."""

    kind: str
    value: int
    period_s: int


@dataclass(frozen=True)
class Rules:
    """Scaling rules of one direction: policies, which of them counts, the stabilization window, the tolerance."""

    policies: tuple[Policy, ...]
    window_s: int
    select: str = "Max"
    tolerance: float = 0.1


# "Default behavior" of the documentation.
SCALE_UP = Rules((Policy("Percent", 100, 15), Policy("Pods", 4, 15)), window_s=0)
SCALE_DOWN = Rules((Policy("Percent", 100, 15),), window_s=300)


@dataclass(frozen=True)
class Spec:
    """What a manifest says, without its metrics.

    Raises:
        ValueError: what the API server would refuse.
    """

    min_replicas: int
    max_replicas: int
    up: Rules = SCALE_UP
    down: Rules = SCALE_DOWN

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"{self.min_replicas} to {self.max_replicas} replicas")
        for rules in (self.up, self.down):
            if not 0 <= rules.window_s <= 3600 or rules.select not in SELECT or not 0 <= rules.tolerance < 1:
                raise ValueError(f"window {rules.window_s} s, select {rules.select}, tolerance {rules.tolerance}")
            if not rules.policies:
                raise ValueError("at least one policy in each direction")
            for policy in rules.policies:
                if policy.kind not in ("Pods", "Percent") or policy.value < 1 or not 1 <= policy.period_s <= 1800:
                    raise ValueError(f"no such policy: {policy}")


@dataclass(frozen=True)
class PodsMetric:
    """A metric that each pod has (type Pods, target AverageValue).

    Args:
        target: for the mean over pods.
        values: of the pods that run and gave one.
        missing: pods that run and gave none.
        unready: pods that do not run yet. (One that runs and gives a value counts, ready or not, unless it is CPU.)
    """

    target: float
    values: tuple[float, ...]
    missing: int = 0
    unready: int = 0


@dataclass(frozen=True)
class PoolMetric:
    """One number for the whole pool (types Object and External), against the target as it is, or per pod.

    Args:
        target: of type Value, or of type AverageValue if `per_pod`.
        value: the number; None if it could not be fetched.
        ready: pods that run and are ready.
    """

    target: float
    value: float | None
    ready: int
    per_pod: bool


@dataclass(frozen=True)
class History:
    """What the controller remembers: its recommendations, and by how much it scaled; (seconds, replicas) each."""

    recommendations: tuple[tuple[float, int], ...] = ()
    changes: tuple[tuple[float, int], ...] = ()


def recommend(spec: Spec, current: int, metric: PodsMetric | PoolMetric) -> int | None:
    """The replicas that one metric asks for, before windows, policies and limits; None if that cannot be told.

    Raises:
        ValueError: a target that is not above zero.
    """
    if not metric.target > 0:
        raise ValueError(f"a target of {metric.target}")
    target = _milli(metric.target)
    if isinstance(metric, PodsMetric):
        return _by_pods(spec, current, metric, target)
    if metric.value is None:
        return None
    ratio = _milli(metric.value) / target
    if metric.per_pod:
        return current if _near(spec, ratio / current) else math.ceil(ratio)
    return current if _near(spec, ratio) else math.ceil(ratio * metric.ready)


def _by_pods(spec: Spec, current: int, metric: PodsMetric, target: int) -> int | None:
    values = list(map(_milli, metric.values))
    if not values:
        return None
    ratio = _ratio(values, target)
    # Who cannot be seen is assumed to damp the change: at the target when scaling down, idle when scaling up.
    assumed = [target] * metric.missing if ratio < 1 else []
    assumed += [0] * (metric.missing + metric.unready) if ratio > 1 else []
    damped = _ratio(values + assumed, target)
    if _near(spec, damped) or (ratio - 1) * (damped - 1) < 0:
        return current
    wanted = math.ceil(damped * len(values + assumed))
    turned = wanted > current if damped < 1 else wanted < current
    return current if assumed and turned else wanted


def decide(
    spec: Spec, history: History, now_s: float, current: int, metrics: Sequence[PodsMetric | PoolMetric]
) -> tuple[int, History]:
    """One turn of the controller: how many replicas from now on, and what it then remembers.

    Args:
        history: from the turn before; `History()` at first.
        now_s: seconds on any clock that does not go back.
        current: replicas asked for until now, ready or not.
    """
    if not spec.min_replicas <= current <= spec.max_replicas:
        wanted = min(max(current, spec.min_replicas), spec.max_replicas)
        return wanted, _remember(spec, history, now_s, None, wanted - current)
    asked = [recommend(spec, current, metric) for metric in metrics]
    known = [count for count in asked if count is not None]
    if not known or (len(known) < len(asked) and max(known) < current):
        return current, history  # what cannot be seen might need more
    stable = _stabilized(spec, history, now_s, current, max(known))
    wanted = _limited(spec, history, now_s, current, stable)
    return wanted, _remember(spec, history, now_s, max(known), wanted - current)


def _stabilized(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> int:
    """The least that was asked for within the window of scaling up, at most the most within that of scaling down."""
    least = min([wanted, *(count for at, count in history.recommendations if at > now_s - spec.up.window_s)])
    most = max([wanted, *(count for at, count in history.recommendations if at > now_s - spec.down.window_s)])
    return min(max(current, least), most)


def _limited(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> int:
    if wanted > current:
        allowed = max(current, _furthest(spec.up, +1, history, now_s, current))
        return min(wanted, allowed, spec.max_replicas)
    if wanted < current:
        allowed = min(current, _furthest(spec.down, -1, history, now_s, current))
        return max(wanted, allowed, spec.min_replicas)
    return current


def _furthest(rules: Rules, sign: int, history: History, now_s: float, current: int) -> int:
    """How far the policies let the replicas go up (`sign` +1) or down (-1)."""
    if rules.select == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        before = current - sum(change for at, change in history.changes if at > now_s - policy.period_s)
        if policy.kind == "Pods":
            limits.append(before + sign * policy.value)
        elif sign > 0:
            limits.append(math.ceil(before * (1 + policy.value / 100)))
        else:
            limits.append(int(before * (1 - policy.value / 100)))
    return max(limits) if (rules.select == "Max") == (sign > 0) else min(limits)


def _remember(spec: Spec, history: History, now_s: float, recommendation: int | None, change: int) -> History:
    window_s = max(spec.up.window_s, spec.down.window_s)
    period_s = max(policy.period_s for rules in (spec.up, spec.down) for policy in rules.policies)
    recommendations = [entry for entry in history.recommendations if entry[0] > now_s - window_s]
    changes = [entry for entry in history.changes if entry[0] > now_s - period_s]
    recommendations += [(now_s, recommendation)] if recommendation is not None else []
    changes += [(now_s, change)] if change else []
    return History(tuple(recommendations), tuple(changes))


def _near(spec: Spec, ratio: float) -> bool:
    return 1 - spec.down.tolerance <= ratio <= 1 + spec.up.tolerance


def _ratio(values: Sequence[int], target: int) -> float:
    return sum(values) // len(values) / target


def _milli(value: float) -> int:
    return round(1000 * value)
