"""What a step of an engine costs, from steps that were timed: the arithmetic of simulated engines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """A step of the real engine: requests in it, prompt tokens of those that joined, seconds."""

    sequences: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: base, for each request in it, for each prompt token of those that join.

    Batching is continuous: every running request gets a token a step. KV caches that fill are not modelled.
    """

    base_s: float
    sequence_s: float
    prompt_token_s: float

    @staticmethod
    def fit(steps: Sequence[Step]) -> "Costs":
        """Least squares over measured steps, of errors relative to each step.

        A part below zero is no cost: the most negative one is taken to be zero and the others are fitted anew, until
        none is negative. (That need not be the best fit of all without negative parts.)

        Steps with prompts take many times as long as those without: their absolute errors would hide the others.

        Raises:
            ValueError: fewer than three steps.
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
