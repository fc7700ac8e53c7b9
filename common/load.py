"""A wave of load on a vLLM engine in this process, and the field's serving figures of it."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
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


def send_wave(
    llm: "LLM",
    prompts: Sequence[Sequence[int]],
    tokens_out: int,
    on_step: Callable[[Sequence["RequestOutput"]], object] = lambda outputs: None,
    temperature: float = 1.0,
) -> tuple[list[float], list[list[float]]]:
    """Send all prompts at once; drive the engine step by step until each has `tokens_out` tokens.

    Args:
        prompts: token ids, [N][any length].
        on_step: called after each step with its outputs: the i-th prompt is request "i", with its new tokens.

    Returns:
        When each request was sent and when each of its tokens arrived: seconds of `time.perf_counter`, [N] and
        [N][tokens_out].
    """
    sampling = exactly(tokens_out, temperature)
    engine = llm.llm_engine
    sent, arrived = [], [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        sent.append(time.perf_counter())
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrived[int(output.request_id)].extend([now] * len(output.outputs[0].token_ids))
        on_step(outputs)
    return sent, arrived


def summarise(sent: Sequence[float], arrived: Sequence[Sequence[float]], gpus: int) -> dict[str, float]:
    """The field's serving figures of one wave.

    TTFT: sent to first token. TPOT of a request: (last - first token) / (tokens - 1). ITL: the gap between two
    tokens. End to end: sent to last token. Definitions as in vLLM's benchmark client.

    Args:
        sent: seconds, [N].
        arrived: seconds, [N][tokens of the request], from the same clock.
        gpus: that the engine computes on.

    Returns:
        `concurrency` (N), `tokens_per_s` (all output tokens over first sent to last token), `tokens_per_s_gpu`, and
        `ttft_p50_ms`, `ttft_p99_ms`, and the same for `tpot` and `e2e` (over the requests) and `itl` (over all gaps).

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
