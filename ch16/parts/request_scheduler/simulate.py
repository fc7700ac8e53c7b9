"""A simulated engine: continuous batching with the step times of a real one, see `Costs`. There is no preemption."""

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

from ch16.parts.request_scheduler.mix import Answer, Job
from common.costs import Costs


class Clock:
    """Simulated time, in seconds; called like time.monotonic."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def serve_simulated(jobs: Iterable[Job], queue: Any, clock: Clock, costs: Costs, slots: int) -> list[Answer]:
    """Serve `jobs` (by arrival) on one engine of `slots` requests at once, in the order of `queue`: InferenceScheduler.

    Steps in which no request comes, joins or leaves are alike, so time jumps from one such moment to the next: the
    queue's clock is moved. Returns an answer for each job, in the order in which they ended.
    """
    waiting, numbers, step = iter(jobs), itertools.count(), 0
    following = next(waiting, None)
    running: list[tuple[int, int, Job, float]] = []  # the step after which it is done, number, job, its first token
    answers: list[Answer] = []
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
        if not running and not joined:
            continue
        # With prompts, a step of its own; else all steps until a request leaves or comes.
        count = 1
        step_s = costs.step_s(len(running) + len(joined), sum(job.tokens_in for job in joined))
        if not joined:
            count = running[0][0] - step
            if following:
                count = min(count, max(1, -int(-(following.arrival_s - clock.now) // step_s)))
        clock.now += count * step_s
        for job in joined:
            heapq.heappush(running, (step + job.tokens_out, next(numbers), job, clock.now))
        step += count
        for _, _, job, _ in running:
            queue.charge(job.tenant, 2 * count)  # tokens of answers count double
        while running and running[0][0] <= step:
            _, _, job, first_s = heapq.heappop(running)
            answers.append(Answer(job, first_s, clock.now))
    return answers
