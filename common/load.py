"""Load on a vLLM engine in this process, step by step or as a wave, and the field's serving figures of it."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.timing import percentile

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """[count][length] random token ids, 10 to vocab_size - 1: nothing to reuse, so prefix caching cannot flatter."""
    rng = random.Random(seed)
    return [[rng.randrange(10, vocab_size) for _ in range(length)] for _ in range(count)]


def exactly(tokens_out: int, temperature: float = 1.0) -> "SamplingParams":
    """Sampling of just so many tokens, each step's outputs holding the new ones only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature, max_tokens=tokens_out, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


@dataclass(frozen=True)
class EngineStep:
    """One step of an engine that gave tokens."""

    ended: float  # seconds of `time.perf_counter`
    busy_s: float  # in the engine, with the steps before it that gave no token (parts of a long prompt)
    requests: int  # that got a token


@dataclass
class Timeline:
    """What has happened so far, in seconds of `time.perf_counter`, by the name of the request."""

    ahead: int = 0  # steps that are scheduled already when a request is added (asynchronous scheduling)
    sent: dict[str, float] = field(default_factory=dict)
    arrived: dict[str, list[float]] = field(default_factory=dict)
    steps: list[EngineStep] = field(default_factory=list)


class SteppedEngine:
    """A vLLM engine in this process, driven step by step, so that a policy can act between two steps.

    engine = SteppedEngine(llm)
    while waiting or engine.running:
        for request in policy(waiting, engine.running):
            engine.add(request.name, request.prompt, exactly(request.tokens_out))
        engine.step()
    """

    def __init__(self, llm: "LLM") -> None:
        self._engine = llm.llm_engine
        self.timeline = Timeline(ahead=int(bool(self._engine.vllm_config.scheduler_config.async_scheduling)))
        self.running = 0  # requests that were added and are not finished
        self._busy_s = 0.0

    def add(self, name: str, prompt: Sequence[int], sampling: "SamplingParams", priority: int = 0) -> None:
        """Give the engine a request: token ids and what to sample. Its name must be new."""
        self.timeline.sent[name], self.timeline.arrived[name] = time.perf_counter(), []
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling, priority=priority)
        self.running += 1

    def step(self) -> list["RequestOutput"]:
        """One step of the engine: the outputs of the requests that got tokens, each with its new tokens only."""
        began = time.perf_counter()
        outputs = self._engine.step()
        ended = time.perf_counter()
        self._busy_s += ended - began
        for output in outputs:
            self.timeline.arrived[output.request_id].extend([ended] * len(output.outputs[0].token_ids))
            self.running -= output.finished
        if outputs:
            self.timeline.steps.append(EngineStep(ended, self._busy_s, len(outputs)))
            self._busy_s = 0.0
        return outputs


def send_wave(
    llm: "LLM",
    prompts: Sequence[Sequence[int]],
    tokens_out: int,
    on_step: Callable[[Sequence["RequestOutput"]], object] = lambda outputs: None,
) -> tuple[list[float], list[list[float]]]:
    """Send all prompts, [N][any length] token ids, at once; step the engine until each has `tokens_out` tokens.

    After each step `on_step` gets its outputs: the i-th prompt is request "i", with its new tokens. Returns when each
    request was sent, [N], and when its tokens arrived, [N][tokens_out]: seconds of `time.perf_counter`.
    """
    engine, sampling = SteppedEngine(llm), exactly(tokens_out)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, sampling)
    while engine.running:
        on_step(engine.step())
    return list(engine.timeline.sent.values()), list(engine.timeline.arrived.values())


def summarise(sent: Sequence[float], arrived: Sequence[Sequence[float]], gpus: int) -> dict[str, float]:
    """The field's serving figures of one wave, from seconds [N] and [N][tokens of the request], on some GPUs.

    `concurrency` is N; `tokens_per_s` all output tokens over first sent to last token. P50 and P99 in ms of `ttft`:
    sent to first token; `tpot`, per request: (last - first token) / (tokens - 1); `itl`: between two tokens; `e2e`:
    sent to last token. Definitions as in vLLM's benchmark client.

    Raises:
        ValueError: a request with fewer than two tokens has no TPOT.
    """
    if min(map(len, arrived)) < 2:
        raise ValueError("every request needs at least two tokens")
    ttft = [tokens[0] - start for start, tokens in zip(sent, arrived, strict=True)]
    tpot = [(tokens[-1] - tokens[0]) / (len(tokens) - 1) for tokens in arrived]
    itl = [later - earlier for tokens in arrived for earlier, later in itertools.pairwise(tokens)]
    e2e = [tokens[-1] - start for start, tokens in zip(sent, arrived, strict=True)]
    seconds = max(tokens[-1] for tokens in arrived) - min(sent)
    tokens_per_s = sum(map(len, arrived)) / seconds
    row = {"concurrency": len(sent), "tokens_per_s": tokens_per_s, "tokens_per_s_gpu": tokens_per_s / gpus}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2e", e2e)):
        row |= {f"{name}_p50_ms": 1e3 * percentile(values, 50), f"{name}_p99_ms": 1e3 * percentile(values, 99)}
    return row
