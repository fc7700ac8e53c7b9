"""Replicas as an engine runs them: so many slots of continuous batching behind a queue, first come, first served.

Steps take the times of `common.costs.Costs`. Steps in which no request joins or leaves are alike, so time jumps over
them: a request costs two jumps, however many tokens it has. All steps are still counted, so the times are exact. Not
modelled: a KV cache that fills before the slots do, preemption.

Compiled by numba: a day is a million requests, and a search for targets is hundreds of runs. Import this after the
engine has started: vLLM for CPUs looks through all modules then, and fails on one of numba's.
"""

import numpy as np
from numba import njit

from ch16.parts.autoscaling.records import OFF, SERVING


@njit
def _take_steps(
    replica: np.void,
    leave: np.ndarray,
    names: np.ndarray,
    requests: np.ndarray,
    base_s: float,
    sequence_s: float,
    prompt_token_s: float,
    until: float,
) -> None:
    """All steps of one replica that begin before `until`."""
    while replica.clock < until and replica.running + replica.waiting > 0:
        prompt_tokens = 0
        joined = min(replica.waiting, len(leave) - replica.running)
        newest = replica.first
        for _ in range(joined):
            name = replica.first
            replica.first = requests[name].behind
            at, last = replica.running, replica.step + requests[name].tokens_out
            while at > 0 and leave[at - 1] < last:
                leave[at], names[at] = leave[at - 1], names[at - 1]
                at -= 1
            leave[at], names[at] = last, name
            replica.running += 1
            replica.held += requests[name].tokens_in - replica.step
            prompt_tokens += requests[name].tokens_in
        replica.waiting -= joined
        # With prompts, a step of its own; else all steps until a request leaves, or `until`.
        seconds = base_s + sequence_s * replica.running + prompt_token_s * prompt_tokens
        count = 1
        if joined == 0:
            count = leave[replica.running - 1] - replica.step
            if replica.clock + count * seconds > until:
                count = max(1, int(np.ceil((until - replica.clock) / seconds)))
        replica.clock += count * seconds
        replica.busy_s += count * seconds
        replica.step += count
        for _ in range(joined):
            requests[newest].first_s = replica.clock
            newest = requests[newest].behind
        while replica.running > 0 and leave[replica.running - 1] <= replica.step:
            replica.running -= 1
            name = names[replica.running]
            replica.held -= requests[name].tokens_in + requests[name].tokens_out - leave[replica.running]
            requests[name].last_s = replica.clock


@njit
def advance(
    replicas: np.ndarray,
    leave: np.ndarray,
    names: np.ndarray,
    requests: np.ndarray,
    sent: int,
    base_s: float,
    sequence_s: float,
    prompt_token_s: float,
    until: float,
) -> int:
    """Serve until `until`: each request goes to the ready replica with the least in flight.

    Args:
        replicas: [R] of REPLICA; at least one is ready.
        leave: [R, slots], the step in which each running request gets its last token, falling.
        names: [R, slots], the index of that request.
        requests: [N] of REQUEST, by arrival; their times are filled in.
        sent: requests sent before.

    Returns:
        Requests sent until now.
    """
    while True:
        now = until if sent == len(requests) else min(until, requests[sent].at_s)
        best = -1
        for r in range(len(replicas)):
            replica = replicas[r]
            if replica.state == OFF:
                continue
            _take_steps(replica, leave[r], names[r], requests, base_s, sequence_s, prompt_token_s, now)
            if replica.state == SERVING and replica.ready_s <= now:
                in_flight = replica.running + replica.waiting
                if best < 0 or in_flight < replicas[best].running + replicas[best].waiting:
                    best = r
        if now == until:
            return sent
        replica = replicas[best]
        if replica.running + replica.waiting == 0:
            replica.clock = max(replica.clock, now)
        if replica.waiting:
            requests[replica.last].behind = sent
        else:
            replica.first = sent
        replica.last = sent
        replica.waiting += 1
        sent += 1
