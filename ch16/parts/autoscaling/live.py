"""The real engine: waves of requests, every step timed, and one wave more to check the simulation by."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ch16.parts.autoscaling.hpa import Spec
from ch16.parts.autoscaling.records import as_requests
from ch16.parts.autoscaling.signals import by_pool
from ch16.parts.autoscaling.simulate import Pool, simulate
from common.costs import Costs, Step
from common.load import random_prompts, send_wave
from common.timing import percentile
from common.traces import Arrival

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

TOKENS_OUT = 16  # of each answer


def timed_wave(
    llm: "LLM", count: int, tokens_in: int, tokens_out: int, vocab_size: int, seed: int
) -> tuple[list[Step], list[float], float]:
    """`count` requests at once. Returns the steps, each request's time to first token, and output tokens/s."""
    ends: list[tuple[float, int, int]] = []  # of each step: when, requests with a token, of them with the first one
    seen: set[str] = set()

    def on_step(outputs: Sequence) -> None:
        new = {output.request_id for output in outputs} - seen
        seen.update(new)
        ends.append((time.perf_counter(), len(outputs), len(new)))

    sent, arrived = send_wave(llm, random_prompts(count, tokens_in, vocab_size, seed), tokens_out, on_step)
    steps, begun = [], sent[-1]
    for end, sequences, new in ends:
        if sequences:  # a step without tokens is a part of a long prompt: its time goes to the step that ends it
            steps.append(Step(sequences, new * tokens_in, end - begun))
            begun = end
    seconds = max(times[-1] for times in arrived) - sent[0]
    return steps, [times[0] - start for times, start in zip(arrived, sent, strict=True)], count * tokens_out / seconds


def measure_costs(llm: "LLM", slots: int, tokens_in: int, rounds: int, vocab_size: int, seed: int) -> Costs:
    """What a step costs, from waves of one request, of half the slots and of all of them."""
    timed_wave(llm, slots, tokens_in, TOKENS_OUT, vocab_size, seed)  # warm-up
    counts = [1, max(1, slots // 2), slots] * rounds
    waves = [timed_wave(llm, n, tokens_in, TOKENS_OUT, vocab_size, seed + i) for i, n in enumerate(counts, start=1)]
    return Costs.fit([step for steps, _, _ in waves for step in steps])


def check_rows(llm: "LLM", costs: Costs, slots: int, tokens_in: int, vocab_size: int, seed: int) -> list[dict]:
    """Rows (what, real, simulated, error_percent): twice as many requests as slots, all at once."""
    _, real_s, real_rate = timed_wave(llm, 2 * slots, tokens_in, TOKENS_OUT, vocab_size, seed)
    requests = as_requests([Arrival(0.0, tokens_in, TOKENS_OUT)] * (2 * slots))
    outcome = simulate(requests, Pool(costs, slots, 1, 0.0), Spec(1, 1), by_pool(1.0, per_pod=True))
    rate = len(requests) * TOKENS_OUT / float(outcome.requests["last_s"].max())
    pairs = {
        "TTFT P50 s": (percentile(real_s, 50), percentile(outcome.ttft_s, 50)),
        "TTFT max s": (max(real_s), float(outcome.ttft_s.max())),
        "output tok/s": (real_rate, rate),
    }
    return [
        {"what": what, "real": real, "simulated": ours, "error_percent": 100 * (ours / real - 1)}
        for what, (real, ours) in pairs.items()
    ]
