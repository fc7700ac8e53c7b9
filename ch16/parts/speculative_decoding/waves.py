"""A wave of requests, however decoded: its answers, its steps, how it compares with another."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ch16.parts.speculative_decoding.loop import Step
from ch16.parts.speculative_decoding.theory import Counts


@dataclass
class Wave:
    """Answers, and the steps after all of them had begun: the seconds each took, the tokens it gave to each request."""

    answers: list[list[int]] = field(default_factory=list)
    steps: list[tuple[float, list[int]]] = field(default_factory=list)

    def __iadd__(self, other: "Wave") -> "Wave":
        """Another wave after this one."""
        self.answers += other.answers
        self.steps += other.steps
        return self

    @property
    def tokens_per_s(self) -> float:
        """Of decoding alone: the prefill, and with it each first token, is not counted."""
        return sum(sum(new) for _, new in self.steps) / sum(seconds for seconds, _ in self.steps)

    @property
    def passes(self) -> int:
        """Passes of the target, counted for each request in them."""
        return sum(len(new) for _, new in self.steps)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gives a request."""
        return sum(sum(new) for _, new in self.steps) / self.passes

    def step_seconds(self, gave_more: bool | None = None) -> float | None:
        """Mean of the steps; None if there are none.

        Not the median: what is to be explained is a sum of steps, and an engine that schedules ahead returns them in
        uneven gaps.

        Args:
            gave_more: True for those that gave a request more than one token, and so verified a draft; False for those
                that gave one: they had none, or it was wrong from the start.
        """
        seconds = [seconds for seconds, new in self.steps if gave_more in (None, max(new) > 1)]
        return fmean(seconds) if seconds else None


def joined(waves: Iterable[Wave]) -> Wave:
    """All of them, one after another."""
    total = Wave()
    for wave in waves:
        total += wave
    return total


def timed(steps: Iterable[Step]) -> tuple[Wave, list[Step]]:
    """Run one request of the loop. Returns it as a wave, and its steps after the first, which holds the prefill."""
    wave, after_first, last = Wave([[]]), [], None
    for step in steps:
        now = time.perf_counter()
        wave.answers[0].extend(step.tokens)
        if last is not None:
            wave.steps.append((now - last, [len(step.tokens)]))
            after_first.append(step)
        last = now
    return wave, after_first


def count(steps: Sequence[Step]) -> Counts:
    """What became of the drafts of these steps."""
    drafts = [step for step in steps if step.drafted]
    accepted = sum(len(step.tokens) - 1 for step in drafts)
    return Counts(len(steps), len(drafts), accepted, sum(len(step.tokens) > step.drafted for step in drafts))


def compare(
    plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]], gap: Callable[[int, Sequence[int], int, int], float]
) -> dict[str, object]:
    """How many answers are the same, token for token, and how close the choice was where the others part.

    Args:
        gap: of (request, the tokens so far, one next token, the other): the difference of their log-probabilities.

    Returns:
        `same`, as "3 of 4", and `gap`, the largest; None if all are the same.
    """
    gaps = []
    for i, (ours, theirs) in enumerate(zip(plain, other, strict=True)):
        pairs = enumerate(itertools.zip_longest(ours, theirs))
        if (at := next((at for at, (one, two) in pairs if one != two), None)) is not None:
            gaps.append(gap(i, ours[:at], ours[at], theirs[at]))
    return {"same": f"{len(plain) - len(gaps)} of {len(plain)}", "gap": max(gaps, default=None)}
