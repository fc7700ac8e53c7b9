"""What a step of an engine costs, from steps that were timed: the arithmetic of simulated engines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.load import Timeline
from common.results import Column


@dataclass(frozen=True)
class TimedStep:
    """A step of the real engine."""

    sequences: int  # requests in it
    prompt_tokens: int  # of those that joined
    seconds: float


def timed_steps(timeline: Timeline, tokens_in: Mapping[str, int]) -> list[TimedStep]:
    """The steps of a timeline; a prompt (`tokens_in`, by its request) counts in the step that gave its first token."""
    joined: Counter[float] = Counter()
    for name, times in timeline.arrived.items():
        joined[times[0]] += tokens_in[name]
    return [TimedStep(step.requests, joined[step.ended], step.busy_s) for step in timeline.steps]


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: base, per request in it, per prompt token of the requests that join.

    Batching is continuous: every running request gets one token per step. KV caches that fill are not modelled.
    """

    base_s: float
    sequence_s: float
    prompt_token_s: float

    @staticmethod
    def fit(steps: Sequence[TimedStep]) -> "Costs":
        """Least squares over three or more steps, of errors relative to each: steps with prompts take far longer.

        A part below zero is no cost. The most negative one is set to zero and the others are fitted again, until none
        is negative. (That need not be the best of all fits without negative parts.)
        """
        if len(steps) < 3:
            raise ValueError(f"three kinds of cost cannot be found from {len(steps)} steps")
        terms = np.array([[1.0, step.sequences, step.prompt_tokens] for step in steps])
        terms /= np.array([[step.seconds] for step in steps])
        parts, kept = np.zeros(3), np.arange(3)
        while len(kept):
            found = np.linalg.lstsq(terms[:, kept], np.ones(len(steps)), rcond=None)[0]
            if found.min() >= 0:
                parts[kept] = found
                break
            kept = np.delete(kept, found.argmin())
        return Costs(*map(float, parts))

    def step_s(self, sequences: int, prompt_tokens: int = 0) -> float:
        """Seconds of one step."""
        return self.base_s + self.sequence_s * sequences + self.prompt_token_s * prompt_tokens

    def slot_s(self, slots: int, tokens_in: float, tokens_out: float) -> float:
        """Seconds that one request takes from an engine whose slots are all taken: its share of steps, its prompt."""
        return tokens_out * self.step_s(slots) / slots + self.prompt_token_s * tokens_in


def check_columns(load: str) -> tuple[Column, ...]:
    """The real engine beside the simulated one, under the name of their common load."""
    return (
        Column("what", load),
        Column("real", "vLLM", ",.2f"),
        Column("simulated", "simulated", ",.2f"),
        Column("error_percent", "error %", "+.1f"),
    )


def check_rows(figures: Mapping[str, tuple[float, float]]) -> list[dict]:
    """Rows of `check_columns` from a real and a simulated value by name."""
    return [
        {"what": what, "real": real, "simulated": simulated, "error_percent": 100 * (simulated / real - 1)}
        for what, (real, simulated) in figures.items()
    ]
