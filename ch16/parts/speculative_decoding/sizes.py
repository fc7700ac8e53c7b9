"""How much the script does: on a GPU, on two CPU cores, in a classroom."""

from dataclasses import dataclass, replace

from common.gpu import Machine


@dataclass(frozen=True)
class SpeculationSizes:
    """Tasks per text and tokens per answer, for vLLM and for the loop; gammas and batches to try; rounds."""

    tasks: int
    tokens: int
    loop_tasks: int
    loop_tokens: int
    gammas: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int  # at batch 1
    rounds_together: int  # at larger batches, which are averages already


def least_tokens(gamma: int) -> int:
    """Tokens of an answer that has room for more than one draft of `gamma` and the token after it."""
    return gamma + 2


def sizes_for(machine: Machine, quick: bool, tokens: int | None, gamma: int) -> SpeculationSizes:
    """A few seconds per figure; `gamma` is among those tried, and answers have room for it."""
    if quick:
        sizes = SpeculationSizes(2, 24, 1, 24, (1, 4, 8), (1, 16), 1, 1)
    elif machine.device == "cuda":
        sizes = SpeculationSizes(4, 128, 4, 64, (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256), 5, 3)
    else:
        sizes = SpeculationSizes(4, 64, 2, 64, (1, 2, 4, 8, 16), (1, 4, 16, 64), 2, 1)
    if tokens:
        sizes = replace(sizes, loop_tokens=tokens, tokens=tokens)
    least = least_tokens(gamma)
    sizes = replace(sizes, loop_tokens=max(least, sizes.loop_tokens), tokens=max(least, sizes.tokens))
    return replace(sizes, gammas=tuple(sorted({*sizes.gammas, gamma})))
