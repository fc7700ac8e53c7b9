"""A bursty mix of requests of three classes and many tenants, and what became of them."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.results import Column
from common.timing import percentile

# The chapter's priorities (lower goes first), and their part of the load.
CLASSES = {"high": (0, 0.2), "normal": (10, 0.5), "low": (20, 0.3)}
HEAVY = "heavy"  # the tenant that sends most; the others share the rest
HEAVY_PART, LIGHT_TENANTS = 0.7, 9


@dataclass(frozen=True)
class Job:
    """A request: when it comes (seconds from the start), how urgent, whose, and how many tokens in and out."""

    arrival_s: float
    kind: str  # of CLASSES
    tenant: str
    tokens_in: int
    tokens_out: int

    @property
    def priority(self) -> int:
        """The chapter's number; lower goes first."""
        return CLASSES[self.kind][0]


@dataclass(frozen=True)
class Answer:
    """When a job got its first and its last token: seconds from the start."""

    job: Job
    first_s: float
    last_s: float

    @property
    def ttft_s(self) -> float:
        """Time to first token, from arrival."""
        return self.first_s - self.job.arrival_s


def bursty_mix(count: int, mean_per_s: float, period_s: float, tokens_in: int, tokens_out: int, seed: int) -> list[Job]:
    """Poisson arrivals whose rate is 1.5 times the mean in one half of each period and half of it in the other.

    An endless period has no bursts. Answers are `tokens_out` long on average, between a half and one and a half of it.

    Args:
        count: of jobs; the result has as many, by arrival.
        mean_per_s: requests a second.
        period_s: seconds from one burst to the next, or math.inf.
        tokens_in: of each prompt.
        tokens_out: of an answer, on average; at least 2 in each.
    """
    rng = random.Random(seed)
    names, parts = list(CLASSES), [part for _, part in CLASSES.values()]
    lengths = range(max(2, tokens_out // 2), tokens_out + tokens_out // 2 + 1)
    jobs, now = [], 0.0
    for _ in range(count):
        burst = 1.5 if math.fmod(now, period_s) < period_s / 2 else 0.5
        now += rng.expovariate(mean_per_s * (1.0 if math.isinf(period_s) else burst))
        tenant = HEAVY if rng.random() < HEAVY_PART else f"light-{rng.randrange(LIGHT_TENANTS)}"
        jobs.append(Job(now, rng.choices(names, parts)[0], tenant, tokens_in, rng.choice(lengths)))
    return jobs


WAIT_COLUMNS = (
    Column("policy", "policy"),
    Column("group", "requests"),
    Column("count", "number", ",d"),
    Column("p50_s", "TTFT P50 s", ",.2f"),
    Column("p99_s", "TTFT P99 s", ",.2f"),
    Column("max_s", "TTFT max s", ",.2f"),
    Column("bound_s", "bound s", ",.2f"),
    Column("over_bound", "beyond it", ",d"),
    Column("tokens_per_s", "all, output tok/s", ",.1f"),
)


def by_class(job: Job) -> str:
    """Urgency, as a group of rows."""
    return f"{list(CLASSES).index(job.kind) + 1} {job.kind}"


def by_tenant(job: Job) -> str:
    """The tenant that sends most, or one of the others."""
    return "heavy tenant" if job.tenant == HEAVY else "light tenants"


def wait_rows(
    policy: str, answers: Sequence[Answer], group: Callable[[Job], str], bound_s: Callable[[Job], float] | None = None
) -> list[dict]:
    """Rows of WAIT_COLUMNS: time to first token by group, and how many waited longer than `bound_s`.

    Args:
        answers: at least one.
        group: the name of a job's row; rows are sorted by it.
        bound_s: seconds that a job may wait.
    """
    end = max(answer.last_s for answer in answers)
    throughput = sum(answer.job.tokens_out for answer in answers) / end
    rows = []
    for name in sorted({group(answer.job) for answer in answers}):
        inside = [answer for answer in answers if group(answer.job) == name]
        waits = [answer.ttft_s for answer in inside]
        row = {"policy": policy, "group": name, "count": len(waits), "tokens_per_s": throughput}
        row |= {"p50_s": percentile(waits, 50), "p99_s": percentile(waits, 99), "max_s": max(waits)}
        if bound_s:
            row["bound_s"] = max(bound_s(answer.job) for answer in inside)
            row["over_bound"] = sum(answer.ttft_s > bound_s(answer.job) for answer in inside)
        rows.append(row)
    return rows
