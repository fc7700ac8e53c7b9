"""Where tokens go: simulated routing patterns, how even the load is, and what uneven routing costs.

Load balance is described by the measures of the field. With c[e] rows for expert e of E, R rows in all:

    max / mean   rows of the busiest expert over the mean
    CV           coefficient of variation: standard deviation of c over its mean
    entropy      -sum p log p / log E with p = c / R: 1 is even, 0 is one expert for all
    empty        experts without a row
    dropped      rows beyond the capacity of an expert, ceil(factor x R / E) (Switch Transformer, arXiv 2101.03961)
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing, route
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.sizes import MoESizes
from common.cli import CannotRun
from common.device import torch_dtype
from common.gpu import Machine
from common.timing import Timing, graphed, measure_together, relative_spread

REFERENCE = "balanced"
PATTERNS = (REFERENCE, "uniform", "zipf", "hot")
ZIPF_EXPONENT = 1.0
HOT_SHARE = 0.5  # of the tokens go to the hot expert with one of their choices
CAPACITY_FACTOR = 1.25
RANKS = 8  # emulated, where the cost of the busiest rank is measured on one device


def make_routing(pattern: str, tokens: int, experts: int, top_k: int, seed: int = 0, device: str = "cpu") -> Routing:
    """Simulated choices of a router: K = `top_k` different experts for each token.

    "balanced": as even as numbers allow (no real router is). "uniform": each choice equally likely, so uneven by
    chance. "zipf": the expert of rank r is 1 / r as popular. "hot": half of all tokens choose expert 0, the other
    choices are uniform.

    Raises:
        CannotRun: no tokens, or more choices than experts.
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
    """The measures above for rows c[e], at least one; percentages for empty experts and dropped rows."""
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
    """Rows of each rank [ranks] when experts are spread in order over them."""
    load = np.asarray(load)
    require_divisible(load.size, ranks)
    return load.reshape(ranks, -1).sum(axis=1)


def rank_part(routing: Routing, experts: int, rank: int, ranks: int) -> tuple[torch.Tensor, Routing]:
    """What rank `rank` of `ranks` would compute: the token of each of its rows [R], and their routing there [R, 1]."""
    require_divisible(experts, ranks)
    share = experts // ranks
    tokens, choice = (routing.experts // share == rank).nonzero(as_tuple=True)
    chosen = routing.experts[tokens, choice] - rank * share
    return tokens, Routing(chosen[:, None], torch.ones(len(tokens), 1, device=tokens.device))


def busiest_part(routing: Routing, experts: int, ranks: int) -> tuple[int, torch.Tensor, Routing]:
    """The rank with the most rows, and its part as `rank_part` gives it."""
    busiest = int(rank_load(expert_load(routing, experts), ranks).argmax())
    return busiest, *rank_part(routing, experts, busiest, ranks)


def rows_exchanged(routing: Routing, ranks: int, share: int) -> int:
    """The most rows a rank sends to other ranks, or receives: tokens and experts in order, `share` experts each."""
    homes = routing.experts.cpu() // share
    owners = (torch.arange(len(homes)) * ranks // len(homes))[:, None].expand_as(homes)
    leaving = homes != owners
    counts = [torch.bincount(side[leaving], minlength=ranks).max() for side in (owners, homes)]
    return int(max(counts))


def require_divisible(experts: int, ranks: int) -> None:
    """Raise CannotRun unless each rank gets the same number of experts."""
    if experts % ranks:
        raise CannotRun(f"{experts} experts do not divide by {ranks} ranks")


def measure_routing(
    preset: Preset, dispatch: Dispatch, trained: Sequence[Routing], machine: Machine, sizes: MoESizes, seed: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for a layer: simulated patterns, and the most and least even layer of a trained model.

    `trained` has the routing of the most tokens in each layer of a model with as many experts, or nothing.
    """
    experts, rows = Experts.random(preset.sizes, machine.device, torch_dtype(machine)), []
    ordered = sorted(trained, key=lambda routing: int(expert_load(routing, preset.experts).max()))
    for count in tqdm(sizes.tokens, desc="routing", leave=False, disable=None):
        shape = count, preset.experts, preset.top_k, seed, machine.device
        routings = {name: make_routing(name, *shape) for name in PATTERNS}
        if ordered:
            routings |= {"trained, evenest": ordered[0][:count], "trained, most uneven": ordered[-1][:count]}
        x = torch.randn(count, preset.hidden, device=machine.device, dtype=experts.w_in.dtype)
        rows += measure_patterns(routings, dispatch, x, experts, machine.device, sizes.repeats)
    return rows


@torch.no_grad()
def measure_patterns(
    routings: Mapping[str, Routing], dispatch: Dispatch, x: torch.Tensor, experts: Experts, device: str, repeats: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for tokens x [T, H] and routings, REFERENCE among them, timed turn by turn.

    A cost is of the medians, in percent. Its spread is the interquartile range of the turns' own ratios to balanced
    routing over their median, also in percent.
    """
    count = experts.sizes.experts
    ranks = RANKS if count % RANKS == 0 else 1
    works = {}
    for name, routing in routings.items():
        works[name] = lambda routing=routing: dispatch(x, experts, routing)
        if ranks > 1:
            share = count // ranks
            busiest, tokens, local = busiest_part(routing, count, ranks)
            rows, shard = x[tokens], experts.part(busiest * share, share)
            works[name, "rank"] = lambda rows=rows, shard=shard, local=local: dispatch(rows, shard, local)
    if device == "cuda":
        works = {name: graphed(work) for name, work in works.items()}
    took, found = measure_together(works, device, repeats=repeats), []
    for name, routing in routings.items():
        load = expert_load(routing, count)
        row = {"pattern": name, "tokens": len(x), **load_balance(load), **_cost(took[name], took[REFERENCE])}
        row["load"] = sorted(load.tolist(), reverse=True)
        if ranks > 1:
            by_rank, cost = rank_load(load, ranks), _cost(took[name, "rank"], took[REFERENCE, "rank"])
            row["rank_max_mean"] = float(by_rank.max() / by_rank.mean())
            row |= {f"rank_{key}": value for key, value in cost.items()}
        found.append(row)
    return found


def _cost(timing: Timing, reference: Timing) -> dict[str, float]:
    """Milliseconds, their cost over the reference, and how much that differs from turn to turn."""
    ratios = [seconds / even for seconds, even in zip(timing.seconds, reference.seconds, strict=True)]
    return {
        "ms": 1e3 * timing.median,
        "cost_percent": 100 * (timing.median / reference.median - 1),
        "spread_percent": 100 * relative_spread(ratios),
    }
