"""A simulated engine: continuous batching with the step times of a real one.

Every running request gets a token a step. A step takes `base_s`, and `sequence_s` for each request, and
`prompt_token_s` for each token of the prompts that join in it. Nothing else is modelled: no KV cache that fills, no
preemption.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ch16.scheduling.mix import Answer, Job


@dataclass(frozen=True)
class Step:
    """A step of the real engine: requests in it, prompt tokens of those that joined, seconds."""

    sequences: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: base, for each request in it, for each prompt token."""

    base_s: float
    sequence_s: float
    prompt_token_s: float

    @staticmethod
    def fit(steps: Sequence[Step]) -> "Costs":
        """Least squares over measured steps; no part below zero.

        Raises:
            ValueError: fewer than three steps.
        """
        if len(steps) < 3:
            raise ValueError(f"three kinds of cost cannot be found from {len(steps)} steps")
        terms = np.array([[1.0, step.sequences, step.prompt_tokens] for step in steps])
        seconds, kept = np.array([step.seconds for step in steps]), [0, 1, 2]
        while True:
            found, *_ = np.linalg.lstsq(terms[:, kept], seconds, rcond=None)
            if min(found, default=0.0) >= 0:
                break
            kept.pop(int(np.argmin(found)))  # without the part that came out below zero
        parts = dict(zip(kept, map(float, found), strict=True))
        return Costs(*(parts.get(i, 0.0) for i in range(3)))

    def step_s(self, sequences: int, prompt_tokens: int = 0) -> float:
        """Seconds of one step."""
        return self.base_s + self.sequence_s * sequences + self.prompt_token_s * prompt_tokens

    def requests_per_s(self, slots: int, tokens_in: int, tokens_out: int) -> float:
        """Requests a second when all slots are always taken: each brings a prompt, and takes a step for each token."""
        return slots / (tokens_out * self.step_s(slots) + slots * self.prompt_token_s * tokens_in)


class Queue(Protocol):
    """What decides who goes next: see InferenceScheduler."""

    def __len__(self) -> int: ...
    def add_request(self, request: object, priority: int = 0, *, tokens: int = 1, tenant: str = "") -> object: ...  # noqa: D102
    def get_next_batch(self, max_batch_size: int = 32, max_tokens: int | None = None) -> list: ...  # noqa: D102
    def charge(self, tenant: str, tokens: float) -> None: ...  # noqa: D102


class Clock:
    """Simulated time, in seconds; called like time.monotonic."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def simulate(jobs: Iterable[Job], queue: Queue, clock: Clock, costs: Costs, slots: int) -> list[Answer]:
    """Serve `jobs` (by arrival) on one engine of `slots` requests at once, in the order that `queue` gives.

    Steps in which nobody comes, joins or leaves are alike, so time jumps from one such moment to the next.
    """
    waiting = iter(jobs)
    following = next(waiting, None)
    running: list[tuple[int, int, Job]] = []  # (step after which it is done, number, job)
    first_s: dict[int, float] = {}
    answers: list[Answer] = []
    step = number = 0
    while following or running or len(queue):
        if not running and not len(queue):
            clock.now = max(clock.now, following.arrival_s)
        now = clock.now
        while following and following.arrival_s <= now:
            clock.now = following.arrival_s  # it came while steps were taken
            queue.add_request(following, following.priority, tokens=following.tokens_in, tenant=following.tenant)
            following = next(waiting, None)
        clock.now = now
        joined = queue.get_next_batch(slots - len(running)) if len(running) < slots else []
        names = range(number, number + len(joined))
        for name, job in zip(names, joined, strict=True):
            heapq.heappush(running, (step + job.tokens_out, name, job))
        number += len(joined)
        if not running:
            continue
        # With prompts, a step of its own; else as many as pass before somebody leaves or comes.
        count = 1
        step_s = costs.step_s(len(running), sum(job.tokens_in for job in joined))
        if not joined:
            count = running[0][0] - step
            if following:
                count = min(count, max(1, -int(-(following.arrival_s - clock.now) // step_s)))
        step += count
        clock.now += count * step_s
        for name in names:
            first_s[name] = clock.now
        for _, _, job in running:
            queue.charge(job.tenant, 2 * count)  # tokens of answers count double
        while running and running[0][0] <= step:
            _, name, job = heapq.heappop(running)
            answers.append(Answer(job, first_s.pop(name), clock.now))
    return answers
