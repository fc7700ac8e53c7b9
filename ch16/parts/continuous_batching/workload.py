"""How much the script does, and what the engine is asked: requests of random tokens, streams and long prompts."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from common.gpu import Machine
from common.load import random_prompts


@dataclass(frozen=True)
class AdmissionLoad:
    """Requests that all wait at the start."""

    slots: int  # requests that run together
    requests: int
    tokens_in: int
    tokens_out: int  # per answer, on average
    rounds: int  # the median round counts: on a CPU other programs disturb

    @property
    def longest(self) -> int:
        """Tokens of the longest answer there may be."""
        return 8 * self.tokens_out


@dataclass(frozen=True)
class Sweep:
    """Batches to measure, tokens per prompt; `repeats`: decode steps, or prefills, of which the median counts."""

    batches: tuple[int, ...]
    tokens: int
    repeats: int


@dataclass(frozen=True)
class Traffic:
    """Streams of `tokens` each, a long prompt after every `every` tokens, in chunks by these budgets."""

    streams: int
    tokens: int
    prompt: int  # tokens of a long prompt
    every: int
    budgets: tuple[int, ...]  # tokens per step, prompts and streams together
    rounds: int

    @property
    def prompts(self) -> int:
        """Long prompts per run; after the last one the streams go on for as long as before it."""
        return self.tokens // self.every - 1


@dataclass(frozen=True)
class BatchingSizes:
    """What each measurement does; the engine's tokens per step, and tokens of its longest sequence."""

    load: AdmissionLoad
    decode: Sweep
    prefill: Sweep
    traffic: Traffic
    budget: int
    max_model_len: int

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that is sent, and a margin."""
        answered = self.load.tokens_in + self.load.longest, self.decode.tokens + self.decode.repeats
        return 64 + max(*answered, self.prefill.tokens, self.traffic.prompt, self.traffic.tokens)


def sizes_for(machine: Machine, quick: bool) -> BatchingSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    to_64, to_256 = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64, 128, 256)
    if machine.device == "cuda":
        if quick:
            load, traffic = AdmissionLoad(8, 192, 32, 64, 1), Traffic(16, 256, 1536, 32, (1024, 512, 256), 1)
            decode, prefill = Sweep(to_256, 128, 32), Sweep(to_64[:-1], 512, 3)
        else:
            load, traffic = AdmissionLoad(16, 2048, 32, 64, 1), Traffic(32, 512, 3584, 64, (2048, 1024, 512, 256), 3)
            decode, prefill = Sweep(to_256, 512, 32), Sweep(to_64[:-1], 512, 9)
        return BatchingSizes(load, decode, prefill, traffic, budget=16_384, max_model_len=8192)
    if quick:
        load, traffic = AdmissionLoad(4, 40, 8, 12, 1), Traffic(8, 36, 256, 9, (128, 64), 1)
        decode, prefill = Sweep(to_64, 16, 8), Sweep(to_64[:-2], 32, 3)
    else:
        load, traffic = AdmissionLoad(8, 192, 8, 16, 3), Traffic(8, 96, 512, 24, (128, 64, 32), 3)
        decode, prefill = Sweep(to_256[:-1], 16, 16), Sweep(to_64[:-1], 64, 5)
    return BatchingSizes(load, decode, prefill, traffic, budget=2048, max_model_len=2048)


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, and the tokens of its answer."""

    name: str
    prompt: Sequence[int]
    tokens_out: int


def random_requests(
    tokens_in: int, lengths: Sequence[int], vocab_size: int, seed: int, name: str = ""
) -> list[Request]:
    """Numbered requests of `tokens_in` random tokens, whose answers have these lengths."""
    prompts = random_prompts(len(lengths), tokens_in, vocab_size, seed)
    return [Request(f"{name}{i}", prompt, n) for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))]


def geometric_lengths(load: AdmissionLoad, seed: int) -> list[int]:
    """Tokens of each answer: each token is the last one with the same probability.

    The longest of N such lengths is H(N) = 1 + 1/2 + ... + 1/N times the mean (slightly less: `load.longest` cuts it).
    """
    rng = random.Random(seed)
    draws = (1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / load.tokens_out)) for _ in range(load.requests))
    return [min(length, load.longest) for length in draws]


def traffic_requests(traffic: Traffic, vocab_size: int, seed: int) -> tuple[list[Request], list[Request]]:
    """The streams, and the long prompts, which ask for one token: reading them is what disturbs."""
    lengths = traffic.streams * [traffic.tokens + 1]  # the first token of a stream comes before its first gap
    streams = random_requests(8, lengths, vocab_size, seed, "stream ")
    return streams, random_requests(traffic.prompt, traffic.prompts * [1], vocab_size, seed + 1, "long ")
