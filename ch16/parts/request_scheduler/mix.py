"""A bursty mix of requests of three classes and many tenants, and their answers."""

import math
import random
from dataclasses import dataclass

# The chapter's priorities (lower goes first), and their share of the load.
CLASSES = {"high": (0, 0.2), "normal": (10, 0.5), "low": (20, 0.3)}
HEAVY = "heavy"  # the tenant that sends most; the others share the rest evenly
HEAVY_PART, LIGHT_TENANTS = 0.7, 9


@dataclass(frozen=True)
class Job:
    """A request: seconds from the start to its arrival, its class, its tenant, its tokens in and out."""

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
    """Poisson arrivals: 1.5 times the mean rate in the first half of each period, half of it in the second.

    An endless period has no bursts. Lengths of answers are uniform, from half of `tokens_out` to one and a half.

    Args:
        count: of jobs, which are returned by arrival.
        mean_per_s: requests per second.
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
