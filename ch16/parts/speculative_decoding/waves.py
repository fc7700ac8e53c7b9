"""A wave of requests, decoded by our loop or by vLLM: its answers, its steps, how it compares with another."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ch16.parts.speculative_decoding.theory import Counts

TokenLists = Sequence[Sequence[int]]
LoopPass = tuple[list[int], int]  # the tokens that one pass of the target gave, and how many were drafted for it


@dataclass
class DecodedWave:
    """Answers, and the steps after all answers had begun: seconds, and tokens per request."""

    answers: list[list[int]]
    steps: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Of decoding alone: the prefill, which gives each first token, is not counted."""
        return sum(sum(new) for _, new in self.steps) / sum(seconds for seconds, _ in self.steps)

    @property
    def passes(self) -> int:
        """Passes of the target, counted for each request in them."""
        return sum(len(new) for _, new in self.steps)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass and request."""
        return sum(sum(new) for _, new in self.steps) / self.passes

    def step_seconds(self, gave_more: bool | None = None) -> float | None:
        """Mean of all steps, or of those that `gave_more` than one token to a request (or not); None if there are none.

        Steps that gave more verified a draft; the others had none, or its first token was rejected. Not the median: it
        has to explain a sum of steps, and an engine that schedules ahead returns them in uneven gaps.
        """
        seconds = [seconds for seconds, new in self.steps if gave_more in (None, max(new) > 1)]
        return fmean(seconds) if seconds else None


@dataclass(frozen=True)
class WavePair:
    """The same requests without and with speculation: all rounds of each engine, and what became of the drafts."""

    counts: Counts
    plain: DecodedWave
    speculative: DecodedWave

    @property
    def speedup(self) -> float:
        """Of all rounds together."""
        return self.speculative.tokens_per_s / self.plain.tokens_per_s

    @property
    def verify_cost(self) -> float | None:
        """A pass that verified a draft, in decode steps of the same rounds, so that a slow host slows both."""
        seconds = self.speculative.step_seconds(gave_more=True)
        return seconds and seconds / self.plain.step_seconds()

    @property
    def idle_cost(self) -> float | None:
        """A pass without a draft, in decode steps; None on a text where most passes that gave one token had one."""
        seconds = self.speculative.step_seconds(gave_more=False)
        return seconds / self.plain.step_seconds() if seconds and self.counts.share < 0.5 else None


def joined(waves: Iterable[DecodedWave]) -> DecodedWave:
    """All waves, one after another."""
    waves = list(waves)
    return DecodedWave([a for wave in waves for a in wave.answers], [step for wave in waves for step in wave.steps])


def timed(passes: Iterable[LoopPass]) -> tuple[DecodedWave, list[LoopPass]]:
    """Run one request of the loop: its wave, and its passes after the first, which holds the prefill."""
    wave, after_first, last = DecodedWave([[]]), [], None
    for tokens, drafted in passes:
        now = time.perf_counter()
        wave.answers[0].extend(tokens)
        if last is not None:
            wave.steps.append((now - last, [len(tokens)]))
            after_first.append((tokens, drafted))
        last = now
    return wave, after_first


def count(passes: Sequence[LoopPass]) -> Counts:
    """What became of the drafts of these passes."""
    drafts = [(len(tokens) - 1, drafted) for tokens, drafted in passes if drafted]
    complete = sum(accepted == drafted for accepted, drafted in drafts)
    return Counts(len(passes), len(drafts), sum(accepted for accepted, _ in drafts), complete)


def compare(
    prompts: TokenLists, plain: TokenLists, other: TokenLists, gap: Callable[[Sequence[int], int, int], float]
) -> dict[str, object]:
    """How many answers are the `same`, token for token ("3 of 4"), and the largest `gap` where they differ.

    `prompts` are those of the answers, in turn where there are more answers. `gap` gives, for the tokens so far and two
    next ones, the difference of their log-probabilities; the largest is None if all answers are the same.
    """
    gaps = []
    for i, (expected, found) in enumerate(zip(plain, other, strict=True)):
        pairs = enumerate(itertools.zip_longest(expected, found))
        if (at := next((at for at, (left, right) in pairs if left != right), None)) is not None:
            gaps.append(gap([*prompts[i % len(prompts)], *expected[:at]], expected[at], found[at]))
    return {"same": f"{len(plain) - len(gaps)} of {len(plain)}", "gap": max(gaps, default=None)}
