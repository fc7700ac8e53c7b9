"""What a manifest of the HorizontalPodAutoscaler says, what a metric reads, and what the controller remembers."""

from dataclasses import dataclass


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
    """What a manifest says, without its metrics; a ValueError for what the API server would refuse."""

    min_replicas: int
    max_replicas: int
    up: Rules = SCALE_UP
    down: Rules = SCALE_DOWN

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"{self.min_replicas} to {self.max_replicas} replicas")
        for rules in (self.up, self.down):
            within = 0 <= rules.window_s <= 3600 and 0 <= rules.tolerance < 1
            if not within or rules.select not in ("Max", "Min", "Disabled"):
                raise ValueError(f"window {rules.window_s} s, select {rules.select}, tolerance {rules.tolerance}")
            if not rules.policies:
                raise ValueError("at least one policy in each direction")
            for policy in rules.policies:
                if policy.kind not in ("Pods", "Percent") or policy.value < 1 or not 1 <= policy.period_s <= 1800:
                    raise ValueError(f"no such policy: {policy}")


@dataclass(frozen=True)
class PodsMetric:
    """A metric that each pod has (type Pods); `target` is for the mean over pods (AverageValue).

    A pod that runs and gives a value counts, ready or not, except for CPU.
    """

    target: float
    values: tuple[float, ...]  # of the pods that run and gave one
    missing: int = 0  # pods that run and gave none
    unready: int = 0  # pods that do not run yet


@dataclass(frozen=True)
class PoolMetric:
    """One number for the whole pool (types Object and External), against the target as it is, or per pod."""

    target: float  # of type Value, or of type AverageValue if `per_pod`
    value: float | None  # None if it could not be fetched
    ready: int  # pods that run and are ready
    per_pod: bool


@dataclass(frozen=True)
class History:
    """What the controller remembers: its recommendations, and by how much it scaled; (seconds, replicas) each."""

    recommendations: tuple[tuple[float, int], ...] = ()
    changes: tuple[tuple[float, int], ...] = ()

    def after(self, spec: Spec, now_s: float, recommendation: int | None, change: int) -> "History":
        """What it remembers after a turn: as far back as its windows and periods reach."""
        window_s = max(spec.up.window_s, spec.down.window_s)
        period_s = max(policy.period_s for rules in (spec.up, spec.down) for policy in rules.policies)
        recommendations = [entry for entry in self.recommendations if entry[0] > now_s - window_s]
        changes = [entry for entry in self.changes if entry[0] > now_s - period_s]
        recommendations += [(now_s, recommendation)] if recommendation is not None else []
        changes += [(now_s, change)] if change else []
        return History(tuple(recommendations), tuple(changes))
