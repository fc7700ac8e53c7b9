"""Expert parallelism measured: experts spread over this run's processes, checked against one process."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from tqdm import tqdm

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from ch16.parts.moe_benchmark.parallel import ExpertParallel, measure_parallel
from ch16.parts.moe_benchmark.presets import Preset, require_memory
from ch16.parts.moe_benchmark.reference import TOLERANCE
from ch16.parts.moe_benchmark.routing import (
    PATTERNS,
    REFERENCE,
    expert_load,
    make_routing,
    rank_load,
    require_divisible,
    rows_exchanged,
)
from ch16.parts.moe_benchmark.sizes import MoESizes
from common.cli import CannotRun
from common.device import torch_dtype
from common.distributed import Ranks
from common.gpu import Machine


def require_ranks(preset: Preset, tokens: int, machine: Machine, ranks: Ranks) -> None:
    """Raise CannotRun on every rank if any rank cannot go on, before anything is allocated."""
    world, problem = ranks.world_size, None
    shared = world if machine.device == "cpu" else 1  # on a CPU all ranks share the memory
    try:
        require_divisible(preset.experts, world)
        require_memory(preset, tokens, machine, copies=shared, contenders=shared * world * len(PATTERNS))
    except CannotRun as error:
        problem = str(error)
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise CannotRun(found)


@torch.no_grad()
def measure_ranks(
    preset: Preset, dispatch: Dispatch, machine: Machine, ranks: Ranks, sizes: MoESizes, seed: int
) -> list[dict]:
    """Rows of RANK_COLUMNS for each number of tokens per rank and each routing pattern.

    Raises:
        CannotRun: experts do not divide by ranks, they do not fit in memory, or the outputs differ from one process's.
    """
    require_ranks(preset, max(sizes.tokens), machine, ranks)
    world = ranks.world_size
    torch.manual_seed(seed)  # the same weights on every rank, which keeps its share and checks against the whole
    experts = Experts.random(preset.sizes, ranks.device.type, torch_dtype(machine))
    torch.manual_seed(seed + 1 + ranks.rank)  # other tokens on every rank
    share, rows = preset.experts // world, []
    layer = ExpertParallel(experts.part(ranks.rank * share, share), ranks, dispatch)
    for tokens in tqdm(sizes.tokens, desc="ranks", leave=False, disable=None if ranks.rank == 0 else True):
        cases, routings, errors = {}, {}, {}
        for pattern in PATTERNS:
            routing = make_routing(pattern, tokens * world, preset.experts, preset.top_k, seed)
            routings[pattern] = routing
            part = slice(ranks.rank * tokens, (ranks.rank + 1) * tokens)
            own = Routing(routing.experts[part].to(ranks.device), routing.weights[part].to(ranks.device))
            x = torch.randn(tokens, preset.hidden, device=ranks.device, dtype=experts.w_in.dtype)
            errors[pattern] = _largest_difference(layer(x, own), dispatch(x, experts, own))
            if not errors[pattern] <= TOLERANCE:
                raise CannotRun(f"{world} ranks disagree with one process by {100 * errors[pattern]:.1f}%")
            cases[pattern] = x, own
        seconds = measure_parallel(layer, cases, 4 * sizes.repeats)  # processes get out of step at random
        for pattern in PATTERNS:
            row = _row(preset, experts.w_in.element_size(), routings[pattern], world, seconds[pattern])
            row["rank_cost_percent"] = 100 * (seconds[pattern]["step"] / seconds[REFERENCE]["step"] - 1)
            rows.append({"pattern": pattern, "tokens": tokens, **row, "error": errors[pattern]})
    return rows


def _row(preset: Preset, itemsize: int, routing: Routing, world: int, seconds: Mapping[str, float]) -> dict:
    """The load of `world` ranks, and the seconds of `measure_parallel`: keys of RANK_COLUMNS."""
    load = expert_load(routing, preset.experts)
    by_rank = rank_load(load, world)
    busiest = rows_exchanged(routing, world, preset.experts // world) * preset.hidden * itemsize
    return {
        "max_mean": float(load.max() / load.mean()),
        "rank_max_mean": float(by_rank.max() / by_rank.mean()),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items() if name != "spread"},
        "rank_spread_percent": 100 * seconds["spread"],
        "gb_per_s": 2 * busiest / seconds["exchange"] / 1e9 if busiest else None,  # there and back
        "tokens_per_s": len(routing.experts) / seconds["step"],
    }


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, the largest of all ranks."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()
