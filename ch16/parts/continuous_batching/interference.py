"""Who reads the long prompts, and what a run does to the streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ch16.parts.continuous_batching.workload import Request, Traffic
from common.gpu import Machine
from common.load import Timeline

NONE, WHOLE, CHUNKED, SEPARATE = "none", "whole", "in chunks", "on a second engine"


@dataclass(frozen=True)
class PrefillMode:
    """How the long prompts are read, and on which hardware; no budget: as many tokens per step as the engine takes."""

    name: str  # one of the four above
    where: str
    budget: int | None = None
    half: bool = False  # this process's engine has half the cores


@dataclass(frozen=True)
class StreamRun:
    """What became of the streams and the long prompts of one run."""

    gaps_s: list[list[float]]  # between the tokens of each stream
    steps: list[int]  # until the first token of each long prompt
    ttft_s: list[float]  # of each long prompt
    seconds: float  # from the start of the first gap to the end
    tokens: int  # read and written

    @classmethod
    def of(
        cls, timeline: Timeline, streams: Sequence[Request], long: Sequence[Request], spans: list[tuple[float, float]]
    ) -> "StreamRun":
        """The figures of a timeline; `spans`: when each long prompt was sent, and when its first token came."""
        answers = [timeline.arrived[stream.name] for stream in streams]
        start = max(tokens[0] for tokens in answers)
        return cls(
            gaps_s=[[later - earlier for earlier, later in pairwise(tokens)] for tokens in answers],
            steps=[sum(at < step.ended <= first for step in timeline.steps) - timeline.ahead for at, first in spans],
            ttft_s=[first - at for at, first in spans],
            seconds=max([tokens[-1] for tokens in answers] + [first for _, first in spans]) - start,
            tokens=sum(len(tokens) - 1 for tokens in answers) + sum(len(request.prompt) + 1 for request in long),
        )


def prefill_modes(traffic: Traffic, machine: Machine, separate: bool) -> list[PrefillMode]:
    """All modes that this machine has."""
    on_cpu = machine.device == "cpu"
    shared = f"{machine.cores} cores" if on_cpu else "1 GPU"
    modes = [PrefillMode(NONE, shared), PrefillMode(WHOLE, shared)]
    modes += [PrefillMode(CHUNKED, shared, budget) for budget in traffic.budgets]
    if separate and on_cpu:
        first, second = machine.cores // 2, machine.cores - machine.cores // 2
        modes.append(PrefillMode(NONE, f"{first} of {shared}", half=True))
        modes.append(PrefillMode(SEPARATE, f"{first} + {second} cores", half=True))
    elif separate:
        modes.append(PrefillMode(SEPARATE, "1 + 1 GPU"))
    return modes
