"""The same mix on the real engine: requests come when they come, and steps are timed."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ch16.parts.request_scheduler.mix import Answer, Job
from ch16.parts.request_scheduler.simulate import Queue
from common.costs import Step
from common.load import exactly, random_prompts

if TYPE_CHECKING:
    from vllm import LLM


def serve(
    llm: "LLM", jobs: Sequence[Job], vocab_size: int, seed: int, queue: Queue | None = None, slots: int = 0
) -> tuple[list[Answer], list[Step]]:
    """Send each job at its time; drive the engine step by step until all are answered.

    Args:
        jobs: one answer each, in their order.
        vocab_size: of the model; prompts are random tokens, the i-th by `seed` + i.
        queue: if given, requests wait there, and at most `slots` of them are with the engine; else all wait with the
            engine, which knows their priority.
        slots: requests with the engine at once; only with `queue`.

    Returns:
        The answers, in seconds from the start, and every step that gave tokens, with those before it that gave none.
    """
    engine = llm.llm_engine
    prompts = [random_prompts(1, job.tokens_in, vocab_size, seed + i)[0] for i, job in enumerate(jobs)]
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].arrival_s)
    first, last, steps = {}, {}, []
    sent = with_engine = 0
    quiet_s = 0.0  # of steps that gave no token: parts of a long prompt

    def give(i: int) -> None:
        prompt = {"prompt_token_ids": prompts[i]}
        engine.add_request(str(i), prompt, exactly(jobs[i].tokens_out), priority=jobs[i].priority)

    started = time.perf_counter()
    while len(last) < len(jobs):
        now = time.perf_counter() - started
        while sent < len(order) and jobs[order[sent]].arrival_s <= now:
            i = order[sent]
            sent += 1
            if queue is None:
                give(i)
                with_engine += 1
            else:
                queue.add_request(i, jobs[i].priority, tokens=jobs[i].tokens_in, tenant=jobs[i].tenant)
        if queue is not None and with_engine < slots:
            for i in queue.get_next_batch(slots - with_engine):
                give(i)
                with_engine += 1
        if not engine.has_unfinished_requests():
            if sent < len(order):
                time.sleep(max(0.0, min(0.01, jobs[order[sent]].arrival_s - now)))
            continue
        before = time.perf_counter()
        outputs = engine.step()
        after = time.perf_counter()
        new = 0
        for output in outputs:
            i = int(output.request_id)
            if i not in first and output.outputs[0].token_ids:
                first[i] = after - started
                new += jobs[i].tokens_in
            if output.finished:
                last[i] = after - started
                with_engine -= 1
        quiet_s += after - before
        if outputs:
            steps.append(Step(len(outputs), new, quiet_s))
            quiet_s = 0.0
    return [Answer(job, first[i], last[i]) for i, job in enumerate(jobs)], steps
