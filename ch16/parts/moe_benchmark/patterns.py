"""What uneven routing costs, on one device and for the busiest of several ranks."""

from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from ch16.parts.moe_benchmark.parallel import busiest_part
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    RANKS,
    REFERENCE,
    expert_load,
    load_balance,
    make_routing,
    rank_load,
)
from ch16.parts.moe_benchmark.sizes import MoESizes
from common.device import torch_dtype
from common.gpu import Machine
from common.timing import Timing, graphed, measure_together, relative_spread


def measure_routing(
    preset: Preset, dispatch: Dispatch, trained: Sequence[Routing], machine: Machine, sizes: MoESizes, seed: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for a layer: simulated patterns, and the most and least even layer of a trained model.

    Args:
        trained: of each layer of a trained model with as many experts, for the most tokens; or none.
    """
    experts, rows = Experts.random(preset.sizes, machine.device, torch_dtype(machine)), []
    ordered = sorted(trained, key=lambda routing: int(expert_load(routing, preset.experts).max()))
    for count in tqdm(sizes.tokens, desc="routing", leave=False, disable=None):
        routings = {
            name: make_routing(name, count, preset.experts, preset.top_k, seed, machine.device) for name in PATTERNS
        }
        if ordered:
            layers = {"trained, evenest": ordered[0], "trained, most uneven": ordered[-1]}
            routings |= {name: Routing(r.experts[:count], r.weights[:count]) for name, r in layers.items()}
        x = torch.randn(count, preset.hidden, device=machine.device, dtype=experts.w_in.dtype)
        rows += measure_patterns(routings, dispatch, x, experts, machine.device, sizes.repeats)
    return rows


@torch.no_grad()
def measure_patterns(
    routings: Mapping[str, Routing], dispatch: Dispatch, x: torch.Tensor, experts: Experts, device: str, repeats: int
) -> list[dict]:
    """Rows of PATTERN_COLUMNS for tokens x [T, H], all patterns timed turn by turn.

    A cost is of the medians, in percent. Its spread is the interquartile range of the turns' own ratios to balanced
    routing over their median, also in percent.

    Args:
        routings: by name, REFERENCE among them; each for T tokens.
        repeats: turns.
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
