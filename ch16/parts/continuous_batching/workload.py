"""What the engine is asked: requests of random tokens, answers of geometric lengths, streams and long prompts."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ch16.parts.continuous_batching.sizes import AdmissionLoad, Traffic
from common.load import random_prompts


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, and the tokens of its answer."""

    name: str
    prompt: Sequence[int]
    tokens_out: int


def random_requests(tokens_in: int, lengths: Sequence[int], vocab_size: int, seed: int) -> list[Request]:
    """Requests "0", "1", ... of `tokens_in` random tokens, whose answers have these lengths."""
    prompts = random_prompts(len(lengths), tokens_in, vocab_size, seed)
    return [Request(str(i), prompt, n) for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))]


def geometric_lengths(load: AdmissionLoad, seed: int) -> list[int]:
    """Tokens of each answer: each token is the last one with the same probability.

    The longest of N such lengths is H(N) = 1 + 1/2 + ... + 1/N times the mean (slightly less: `load.longest` cuts it).
    """
    rng = random.Random(seed)
    draws = (1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / load.tokens_out)) for _ in range(load.requests))
    return [min(length, load.longest) for length in draws]


def traffic_requests(traffic: Traffic, vocab_size: int, seed: int) -> tuple[list[Request], list[Request]]:
    """The streams, and the long prompts, which ask for one token: reading them is what disturbs."""
    streams = random_prompts(traffic.streams, 8, vocab_size, seed)
    long = random_prompts(traffic.prompts, traffic.prompt, vocab_size, seed + 1)
    return (
        # The first token of a stream comes before its first gap.
        [Request(f"stream {i}", prompt, traffic.tokens + 1) for i, prompt in enumerate(streams)],
        [Request(f"long {i}", prompt, 1) for i, prompt in enumerate(long)],
    )
