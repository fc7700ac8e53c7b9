"""What a step of an engine costs, from steps that were timed, or from the file of an earlier run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import CannotRun


@dataclass(frozen=True)
class Step:
    """A step of the real engine: requests in it, prompt tokens of those that joined, seconds."""

    sequences: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: base, for each request in it, for each prompt token of those that join."""

    base_s: float
    sequence_s: float
    prompt_token_s: float

    @staticmethod
    def fit(steps: Sequence[Step]) -> "Costs":
        """Least squares over measured steps, of errors relative to each step; no part below zero.

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
        """Seconds that one request takes from a replica whose slots are all taken: its share of steps, its prompt."""
        return tokens_out * self.step_s(slots) / slots + self.prompt_token_s * tokens_in


def read_costs(path: str) -> tuple[str, Costs, int, float]:
    """From the JSON of an earlier run: the engine, its costs, its slots, and by how much lengths were multiplied.

    Raises:
        CannotRun: no such file, or it holds none.
    """
    try:
        row = json.loads(Path(path).read_text())["tables"]["costs"]["rows"][0]
        parts = [float(row[f"{part}_ms"]) / 1e3 for part in ("base", "sequence", "prompt_token")]
        source, slots, scale = str(row["source"]), int(row["slots"]), float(row["scale"])
    except OSError as error:
        raise CannotRun(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise CannotRun(f"{path} holds no costs; write such a file with: autoscaling.py --json FILE") from None
    if not (all(0 <= part < math.inf for part in parts) and parts[0] + parts[1] > 0 and slots > 0 < scale < math.inf):
        raise CannotRun(f"{path} holds costs that no engine has: {parts}, {slots} slots, lengths times {scale}")
    return source, Costs(*parts), slots, scale
