"""Who reads the long prompts, and what a run does to the streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ch16.parts.continuous_batching.sizes import Traffic
from ch16.parts.continuous_batching.workload import Request
from common.gpu import Machine
from common.load import Timeline

NONE, WHOLE, CHUNKED, SEPARATE = "none", "whole", "in chunks", "on a second engine"


@dataclass(frozen=True)
class PrefillMode:
    """How the long prompts are read, and on which hardware; no budget: as many tokens per step as the engine takes."""

    name: str
    where: str
    budget: int | None = None
    prompts: bool = True
    half: bool = False  # this process's engine has half the cores
    separate: bool = False


@dataclass(frozen=True)
class StreamRun:
    """What became of the streams and the long prompts of one run."""

    gaps_s: list[list[float]]  # between the tokens of each stream
    steps: list[int]  # until the first token of each long prompt
    ttft_s: list[float]  # of each long prompt
    seconds: float  # from the start of the first gap to the end
    tokens: int  # read and written


def prefill_modes(traffic: Traffic, machine: Machine, separate: bool) -> list[PrefillMode]:
    """All modes that this machine has."""
    on_cpu = machine.device == "cpu"
    shared = f"{machine.cores} cores" if on_cpu else "1 GPU"
    modes = [PrefillMode(NONE, shared, prompts=False), PrefillMode(WHOLE, shared)]
    modes += [PrefillMode(CHUNKED, shared, budget) for budget in traffic.budgets]
    if separate and on_cpu:
        first, second = machine.cores // 2, machine.cores - machine.cores // 2
        modes.append(PrefillMode(NONE, f"{first} of {shared}", prompts=False, half=True))
        modes.append(PrefillMode(SEPARATE, f"{first} + {second} cores", half=True, separate=True))
    elif separate:
        modes.append(PrefillMode(SEPARATE, "1 + 1 GPU", separate=True))
    return modes


def stream_run(
    timeline: Timeline,
    streams: Sequence[Request],
    long: Sequence[Request],
    sent: Sequence[float],
    done: Sequence[float],
) -> StreamRun:
    """The figures of one run.

    Args:
        sent: when each long prompt was sent.
        done: when its first token came.
    """
    answers = [timeline.arrived[stream.name] for stream in streams]
    start = max(tokens[0] for tokens in answers)
    spans = list(zip(sent, done, strict=True))
    return StreamRun(
        gaps_s=[[later - earlier for earlier, later in pairwise(tokens)] for tokens in answers],
        steps=[sum(at < step.ended <= first for step in timeline.steps) - timeline.ahead for at, first in spans],
        ttft_s=[first - at for at, first in spans],
        seconds=max([tokens[-1] for tokens in answers] + list(done)) - start,
        tokens=sum(len(tokens) - 1 for tokens in answers) + sum(len(request.prompt) + 1 for request in long),
    )
