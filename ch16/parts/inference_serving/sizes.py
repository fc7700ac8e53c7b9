"""How much work the demo does."""

from dataclasses import dataclass

from ch16.parts.inference_serving.bodies import MAX_TOKENS
from common.gpu import Machine


@dataclass(frozen=True)
class ServingSizes:
    """Tokens per completion, tokens in and out per load request, first concurrency."""

    completion: int
    tokens_in: int
    tokens_out: int
    first_wave: int


def sizes_for(machine: Machine, quick: bool) -> ServingSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    if machine.device == "cuda":
        return ServingSizes(MAX_TOKENS, 256, 128, 64) if quick else ServingSizes(MAX_TOKENS, 512, 512, 64)
    return ServingSizes(48, 32, 32, 8) if quick else ServingSizes(MAX_TOKENS, 64, 64, 4)
