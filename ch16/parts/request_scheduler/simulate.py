"""A simulated engine: continuous batching with the step times of a real one, see `Costs`. There is no preemption."""

import heapq
from collections.abc import Iterable
from typing import Protocol

from ch16.parts.request_scheduler.mix import Answer, Job
from common.costs import Costs


class Queue(Protocol):
    """What decides which request goes next: see InferenceScheduler."""

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


def serve_simulated(jobs: Iterable[Job], queue: Queue, clock: Clock, costs: Costs, slots: int) -> list[Answer]:
    """Serve `jobs` (by arrival) on one engine of `slots` requests at once, in the order that `queue` gives.

    Steps in which no request comes, joins or leaves are alike, so time jumps from one such moment to the next.

    Args:
        clock: the queue's; it is moved.
        costs: of a step, in seconds.

    Returns:
        An answer for each job, in the order in which they ended; seconds from the start.
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
        # With prompts, a step of its own; else all steps until a request leaves or comes.
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
