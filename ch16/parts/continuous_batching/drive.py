"""A vLLM engine in this process, driven step by step while requests are added on the way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.load import exactly, random_prompts

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, and how many tokens its answer has."""

    name: str
    prompt: Sequence[int]
    tokens_out: int


def random_requests(tokens_in: int, lengths: Sequence[int], vocab_size: int, seed: int) -> list[Request]:
    """Requests "0", "1", ... of `tokens_in` random tokens, whose answers have these lengths."""
    prompts = random_prompts(len(lengths), tokens_in, vocab_size, seed)
    return [Request(str(i), prompt, n) for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))]


@dataclass
class Course:
    """What has happened so far: when requests were added, when each of their tokens came, how many run now.

    `steps`: when each step that gave tokens ended, and how many requests got one. `ahead`: steps that the engine has
    under way already when a request is added (asynchronous scheduling): it is in those after them.
    """

    sent: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, list[float]] = field(default_factory=dict)
    steps: list[tuple[float, int]] = field(default_factory=list)
    running: int = 0
    ahead: int = 0


def drive(llm: "LLM", due: Callable[[Course], Sequence[Request]]) -> Course:
    """Step the engine until nothing runs and nothing more is due.

    Args:
        due: asked before each step: the requests to add now.
    """
    engine = llm.llm_engine
    course = Course(ahead=int(bool(engine.vllm_config.scheduler_config.async_scheduling)))
    while True:
        for request in due(course):
            course.sent[request.name], course.arrived[request.name] = time.perf_counter(), []
            engine.add_request(request.name, {"prompt_token_ids": request.prompt}, exactly(request.tokens_out))
            course.running += 1
        if not course.running:
            return course
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            course.arrived[output.request_id].extend([now] * len(output.outputs[0].token_ids))
            course.running -= output.finished
        if outputs:
            course.steps.append((now, len(outputs)))


def all_at_once(requests: Sequence[Request]) -> Callable[[Course], Sequence[Request]]:
    """All requests before the first step, for `drive`."""
    return lambda course: [] if course.sent else requests
