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

Seconds = tuple[float, float, float]  # of `Costs`: base, per request, per prompt token


@njit
def _take_steps(replica: np.void, slots: np.ndarray, requests: np.ndarray, costs: Seconds, until: float) -> None:
    """All steps of one replica that begin before `until`."""
    base_s, sequence_s, prompt_token_s = costs
    while replica.clock < until and replica.running + replica.waiting > 0:
        prompt_tokens = 0
        joined = min(replica.waiting, len(slots) - replica.running)
        newest = replica.first
        for _ in range(joined):
            name = replica.first
            replica.first = requests[name].behind
            at, leaves = replica.running, replica.step + requests[name].tokens_out
            while at > 0 and slots[at - 1].leaves < leaves:
                slots[at] = slots[at - 1]
                at -= 1
            slots[at].leaves, slots[at].name = leaves, name
            replica.running += 1
            replica.held += requests[name].tokens_in - replica.step
            prompt_tokens += requests[name].tokens_in
        replica.waiting -= joined
        # With prompts, a step of its own; else all steps until a request leaves, or `until`.
        seconds = base_s + sequence_s * replica.running + prompt_token_s * prompt_tokens
        count = 1
        if joined == 0:
            count = slots[replica.running - 1].leaves - replica.step
            if replica.clock + count * seconds > until:
                count = max(1, int(np.ceil((until - replica.clock) / seconds)))
        replica.clock += count * seconds
        replica.busy_s += count * seconds
        replica.step += count
        for _ in range(joined):
            requests[newest].first_s = replica.clock
            newest = requests[newest].behind
        while replica.running > 0 and slots[replica.running - 1].leaves <= replica.step:
            replica.running -= 1
            slot = slots[replica.running]
            replica.held -= requests[slot.name].tokens_in + requests[slot.name].tokens_out - slot.leaves
            requests[slot.name].last_s = replica.clock


@njit
def advance(
    replicas: np.ndarray, slots: np.ndarray, requests: np.ndarray, sent: int, costs: Seconds, until: float
) -> int:
    """Serve until `until`: each request goes to the ready replica with the least in flight. Returns those sent so far.

    Args:
        replicas: [R] of REPLICA; at least one is ready.
        slots: [R, slots] of SLOT: the running requests, those that leave last first.
        requests: [N] of REQUEST, by arrival; their times are filled in. The first `sent` were sent before.
    """
    while True:
        now = until if sent == len(requests) else min(until, requests[sent].at_s)
        best = -1
        for r in range(len(replicas)):
            replica = replicas[r]
            if replica.state == OFF:
                continue
            _take_steps(replica, slots[r], requests, costs, now)
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
