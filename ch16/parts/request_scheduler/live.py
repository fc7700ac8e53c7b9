"""The mix on the real engine: requests are sent at their times, and steps are timed."""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ch16.parts.request_scheduler.mix import Answer, Job
from common.costs import TimedStep, timed_steps
from common.load import SteppedEngine, exactly, random_prompts

if TYPE_CHECKING:
    from vllm import LLM


def serve_live(
    llm: "LLM", jobs: Sequence[Job], vocab_size: int, seed: int, queue: Any = None, slots: int = 0
) -> tuple[list[Answer], list[TimedStep]]:
    """Send each job at its time, as random tokens; step the engine until all are answered.

    With a `queue` (InferenceScheduler) jobs wait there while `slots` of them are with the engine; without one they wait
    in the engine, which knows their priority. Returns an answer for each job, in their order, and the steps.
    """
    prompts = [random_prompts(1, job.tokens_in, vocab_size, seed + i)[0] for i, job in enumerate(jobs)]
    coming = deque(sorted(range(len(jobs)), key=lambda i: jobs[i].arrival_s))
    engine = SteppedEngine(llm)

    def send(i: int) -> None:
        engine.add(str(i), prompts[i], exactly(jobs[i].tokens_out), jobs[i].priority)

    started = time.perf_counter()
    with tqdm(total=len(jobs), desc="requests", leave=False, disable=None) as progress:
        while coming or engine.running or (queue is not None and len(queue)):
            now = time.perf_counter() - started
            while coming and jobs[coming[0]].arrival_s <= now:
                i = coming.popleft()
                if queue is None:
                    send(i)
                else:
                    queue.add_request(i, jobs[i].priority, tokens=jobs[i].tokens_in, tenant=jobs[i].tenant)
            if queue is not None and engine.running < slots:
                for i in queue.get_next_batch(slots - engine.running):
                    send(i)
            if engine.running:
                progress.update(sum(output.finished for output in engine.step()))
            elif coming:
                time.sleep(max(0.0, min(0.01, jobs[coming[0]].arrival_s - now)))
    arrived = [engine.timeline.arrived[str(i)] for i in range(len(jobs))]
    answers = [Answer(job, times[0] - started, times[-1] - started) for job, times in zip(jobs, arrived, strict=True)]
    return answers, timed_steps(engine.timeline, {str(i): job.tokens_in for i, job in enumerate(jobs)})
