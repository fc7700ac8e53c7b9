"""A bursty mix of requests of three classes and many tenants, how many of them, and their answers."""

import math
import random
from dataclasses import dataclass

from common.costs import Costs
from common.gpu import Machine

# The chapter's priorities (lower goes first), and their share of the load.
CLASSES = {"high": (0, 0.2), "normal": (10, 0.5), "low": (20, 0.3)}
HEAVY = "heavy"  # the tenant that sends most; the others share the rest evenly
HEAVY_PART, LIGHT_TENANTS = 0.7, 9
LEAST = 50  # live requests: a fifth of them have high priority, and of fewer there may be none


@dataclass(frozen=True)
class Job:
    """A request."""

    arrival_s: float  # from the start
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


@dataclass(frozen=True)
class SchedulingSizes:
    """The live load, and how many requests are simulated."""

    slots: int  # requests that are decoded together
    tokens: tuple[int, int]  # in and, on average, out
    seconds: float  # during which requests come; longer for a slow model, see live_load
    simulated: int = 100_000
    load: float = 1.3  # over the engine's capacity: a queue grows


def sizes_for(machine: Machine, quick: bool) -> SchedulingSizes:
    """A load that saturates the engine for seconds."""
    simulated = 10_000 if quick else 100_000
    if machine.device == "cuda":
        return SchedulingSizes(64, (256, 128), 10 if quick else 40, simulated)
    return SchedulingSizes(8, (32, 16), 2.5, simulated) if quick else SchedulingSizes(8, (32, 24), 15, simulated)


def live_load(sizes: SchedulingSizes, costs: Costs) -> tuple[int, float, float]:
    """How many requests to send, how many per second on average, and for how many seconds.

    A model so slow that it answers fewer than LEAST within `sizes.seconds` gets more time.
    """
    per_s = sizes.load / costs.slot_s(sizes.slots, *sizes.tokens)
    seconds = max(sizes.seconds, LEAST / per_s)
    return max(LEAST, int(per_s * seconds)), per_s, seconds


def bursty_mix(count: int, mean_per_s: float, period_s: float, tokens_in: int, tokens_out: int, seed: int) -> list[Job]:
    """Poisson arrivals: 1.5 times the mean rate in the first half of each period, half of it in the second.

    A period of math.inf has no bursts. Lengths of answers are uniform, from half of `tokens_out` to one and a half, at
    least 2. Jobs are returned by arrival.
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
