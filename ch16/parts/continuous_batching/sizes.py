"""How much the script does: on a GPU, on two CPU cores, in a classroom."""

from dataclasses import dataclass

from common.gpu import Machine


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
        return 64 + max(
            self.load.tokens_in + self.load.longest,
            self.decode.tokens + self.decode.repeats,
            self.prefill.tokens,
            self.traffic.prompt,
            self.traffic.tokens,
        )


def sizes_for(machine: Machine, quick: bool) -> BatchingSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    to_64 = (1, 2, 4, 8, 16, 32, 64)
    if machine.device == "cuda":
        return BatchingSizes(
            AdmissionLoad(8, 192, 32, 64, 1) if quick else AdmissionLoad(16, 2048, 32, 64, 1),
            Sweep((*to_64, 128, 256), 128 if quick else 512, 32),
            Sweep(to_64[:-1], 512, 3 if quick else 9),
            Traffic(16, 256, 1536, 32, (1024, 512, 256), 1)
            if quick
            else Traffic(32, 512, 3584, 64, (2048, 1024, 512, 256), 3),
            budget=16_384,
            max_model_len=8192,
        )
    return BatchingSizes(
        AdmissionLoad(4, 40, 8, 12, 1) if quick else AdmissionLoad(8, 192, 8, 16, 3),
        Sweep(to_64 if quick else (*to_64, 128), 16, 8 if quick else 16),
        Sweep((1, 2, 4, 8, 16), 32, 3) if quick else Sweep(to_64[:-1], 64, 5),
        Traffic(8, 36, 256, 9, (128, 64), 1) if quick else Traffic(8, 96, 512, 24, (128, 64, 32), 3),
        budget=2048,
        max_model_len=2048,
    )
