"""How much the KV cache monitor measures."""

from dataclasses import dataclass

from common.gpu import Machine


@dataclass(frozen=True)
class CacheSizes:
    """Tokens, blocks and requests of the workloads, and rounds of each comparison."""

    blocks: int  # of the cache
    block_size: int  # tokens
    requests: int  # at once
    max_len: int  # tokens of the longest sequence
    prefix: int  # tokens that prompts have in common
    answer: int  # tokens out where throughput is compared; without --quick a wave takes about a second
    sharing: int  # requests with the common prefix that arrive at once
    rounds: int
    seconds: float  # for which a comparison of throughput goes on if it is not precise after its rounds


def sizes_for(machine: Machine, quick: bool) -> CacheSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores (whose kernels need blocks of 32 tokens)."""
    if machine.device == "cuda":  # short waves in turn: a host that slows down for seconds slows both engines
        rounds, seconds = (3, 0) if quick else (25, 100)
        return CacheSizes(2048, 16, 64, 2048, 1024, 128, sharing=8, rounds=rounds, seconds=seconds)
    if quick:
        return CacheSizes(48, 32, 6, 1280, 768, 16, sharing=1, rounds=3, seconds=0)
    return CacheSizes(80, 32, 8, 2048, 1024, 32, sharing=1, rounds=7, seconds=60)
