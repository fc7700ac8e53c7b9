"""Where tokens go: simulated routing patterns, and measures of how even the load is.

Load balance is described by the measures of the field. With c[e] rows for expert e of E, R rows in all:

    max / mean   rows of the busiest expert over the mean
    CV           coefficient of variation: standard deviation of c over its mean
    entropy      -sum p log p / log E with p = c / R: 1 is even, 0 is one expert for all
    empty        experts without a row
    dropped      rows beyond the capacity of an expert, ceil(factor x R / E) (Switch Transformer, arXiv 2101.03961)
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from ch16.parts.moe_benchmark.experts import Routing, route
from common.cli import CannotRun

REFERENCE = "balanced"
PATTERNS = (REFERENCE, "uniform", "zipf", "hot")
ZIPF_EXPONENT = 1.0
HOT_SHARE = 0.5  # of the tokens go to the hot expert with one of their choices
CAPACITY_FACTOR = 1.25
RANKS = 8  # emulated, where the cost of the busiest rank is measured on one device


def make_routing(pattern: str, tokens: int, experts: int, top_k: int, seed: int = 0, device: str = "cpu") -> Routing:
    """Simulated choices of a router.

    Args:
        pattern: "balanced": as even as numbers allow (no real router is). "uniform": each choice equally likely, so
            uneven by chance. "zipf": the expert of rank r is 1 / r as popular. "hot": half of all tokens choose
            expert 0, the other choices are uniform.
        tokens, experts, top_k: T, E and K; choices of a token differ.

    Raises:
        CannotRun: no tokens, or more choices than experts.
        ValueError: an unknown pattern.
    """
    if tokens < 1:
        raise CannotRun("zero tokens: there is nothing to route")
    if not 1 <= top_k <= experts:
        raise CannotRun(f"{top_k} experts per token, but there are {experts}")
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator).clamp_min(1e-9)))
    shuffled = torch.randperm(experts, generator=generator)  # neighbours share a rank: popular experts should not
    scores = noise  # the K largest of log p + Gumbel noise are K draws without replacement
    if pattern == "balanced":
        turn = torch.arange(tokens * top_k).view(tokens, top_k) % experts  # each token takes the next K
        scores = torch.zeros(tokens, experts).scatter_(1, shuffled[turn], 1.0)
    elif pattern == "zipf":
        scores = noise - ZIPF_EXPONENT * torch.log(shuffled + 1.0)
    elif pattern == "hot":
        wanted = torch.rand(tokens, generator=generator) < HOT_SHARE
        scores = noise.clone()
        scores[:, 0] = torch.where(wanted, noise.max(1).values + 1, noise.min(1).values - 1)
    elif pattern != "uniform":
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not '{pattern}'")
    return route(scores.to(device), top_k)


def expert_load(routing: Routing, experts: int) -> np.ndarray:
    """Rows of each expert: [E] integers."""
    return torch.bincount(routing.experts.flatten().cpu(), minlength=experts).numpy()


def load_balance(load: Sequence[int] | np.ndarray, capacity_factor: float = CAPACITY_FACTOR) -> dict[str, float]:
    """The measures above for rows c[e]; percentages for empty experts and dropped rows.

    Raises:
        ValueError: no experts, or no rows at all.
    """
    load = np.asarray(load, dtype=float)
    if load.size == 0 or load.sum() == 0:
        raise ValueError("load balance needs experts and rows")
    shares = load[load > 0] / load.sum()
    entropy = float(-(shares * np.log(shares)).sum() / math.log(load.size)) if load.size > 1 else 1.0
    capacity = math.ceil(capacity_factor * load.sum() / load.size)
    return {
        "max_mean": float(load.max() / load.mean()),
        "cv": float(load.std() / load.mean()),
        "entropy": entropy,
        "empty_percent": 100 * float((load == 0).mean()),
        "dropped_percent": 100 * float(np.maximum(load - capacity, 0).sum() / load.sum()),
    }


def rank_load(load: Sequence[int] | np.ndarray, ranks: int) -> np.ndarray:
    """Rows of each rank when experts are spread in order over `ranks` of them: [ranks].

    Raises:
        CannotRun: experts do not divide by ranks.
    """
    load = np.asarray(load)
    require_divisible(load.size, ranks)
    return load.reshape(ranks, -1).sum(axis=1)


def rows_exchanged(routing: Routing, ranks: int, share: int) -> int:
    """The most rows a rank sends to other ranks, or receives, when tokens and experts are spread in order.

    Args:
        routing: of the tokens of all ranks, [T, k].
        share: experts per rank.
    """
    homes = routing.experts.cpu() // share
    owners = (torch.arange(len(homes)) * ranks // len(homes))[:, None].expand_as(homes)
    leaving = homes != owners
    counts = [torch.bincount(side[leaving], minlength=ranks).max() for side in (owners, homes)]
    return int(max(counts))


def require_divisible(experts: int, ranks: int) -> None:
    """Raise CannotRun unless each rank gets the same number of experts."""
    if experts % ranks:
        raise CannotRun(f"{experts} experts do not divide by {ranks} ranks")
